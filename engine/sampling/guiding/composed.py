"""Several attributes, each guided with its own scale: Liu et al. 2022, "Compositional visual generation", equation 11.

D = D_base + sum_k s_k (D_{base + k} - D_base). The base is given the attributes that have no scale of their own; branch k is
also given attribute k. All branches run in one batch. N images, K scaled attributes, C channels, H x W pixels.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from duotone.data.refusal import Refused, finite
from duotone.engine.conditioning.attributes import UNKNOWN, attribute_row, place
from duotone.engine.conditioning.base import Conditioning
from duotone.engine.cuda_graph import Recordings
from duotone.engine.model.network import Network
from duotone.engine.objectives.base import Objective
from duotone.engine.sampling.guidance import denoised, keys_values, scalings


def branches(asked: list, scales: Mapping[str, float], names: tuple[str, ...]) -> list[list[int]]:
    """Attribute rows of every branch, (1 + K) N: first the base's N, then N for each scaled attribute."""
    full = [attribute_row(value, names) for value in asked]
    places = [place(name, names) for name in scales]
    base = [[UNKNOWN if i in places else state for i, state in enumerate(row)] for row in full]
    raised = [[row[k] if i == k else state for i, state in enumerate(b)] for k in places for row, b in zip(full, base)]
    return base + raised


def check(conditioner, scales: Mapping[str, float], asked: list) -> None:
    """Raises Refused on scales of attributes that were never left out in training, or that are unknown for an image."""
    if not scales:
        raise Refused("guidance by attribute is empty: give at least one attribute and its scale")
    for name, scale in scales.items():
        finite(f"guidance of {name}", scale)
    if conditioner.attribute_dropout == 0:
        raise Refused(
            "guidance by attribute needs attributes that were left out one by one in training, but this network was "
            "trained with attribute_dropout 0: give one guidance scale for all attributes"
        )
    for i, value in enumerate(asked):
        row = attribute_row(value, conditioner.names)
        for name in scales:
            if row[place(name, conditioner.names)] == UNKNOWN:
                raise Refused(
                    f"guidance has a scale for {name!r}, which is unknown for image {i}: give it 0 or 1 there"
                )


class ComposedDenoiser:
    """denoise(x, sigma) for samplers. `calls` counts its calls, `forwards` their cost in forward passes of one image."""

    def __init__(self, network: Network, objective: Objective, condition: Conditioning, scales: list[float]):
        """`condition` has (1 + K) N rows, in the order of `branches`."""
        self.network, self.objective, self.condition, self.scales = network, objective, condition, scales
        self.keys_values = keys_values(network, condition)
        self.recordings = Recordings(recording=network.records)
        self.calls, self.forwards = 0, 0.0

    def output(self, scaled_NCHW: Tensor, noise_N: Tensor) -> Tensor:
        return self.network.predict(scaled_NCHW, noise_N, self.condition, self.keys_values)

    @torch.inference_mode()
    def __call__(self, x_NCHW: Tensor, sigma: float) -> Tensor:
        self.calls += 1
        copies = 1 + len(self.scales)
        rows_NCHW = torch.cat([x_NCHW] * copies)
        sigma_N = torch.full((rows_NCHW.shape[0],), sigma, dtype=torch.float64)
        skip_N, out_N, in_N, noise_N = scalings(self.objective, sigma_N, x_NCHW.device)
        self.forwards += rows_NCHW.shape[0]
        scaled_NCHW = (rows_NCHW * in_N[:, None, None, None]).to(self.network.dtype)
        output_NCHW = self.recordings("all branches", self.output, scaled_NCHW, noise_N)
        base_NCHW, *raised = denoised(output_NCHW, rows_NCHW, skip_N, out_N).chunk(copies)
        return base_NCHW + sum(scale * (d_NCHW - base_NCHW) for scale, d_NCHW in zip(self.scales, raised))
