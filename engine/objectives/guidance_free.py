"""Guidance-free training: Chen et al. 2025, "Visual generation without guidance" (arXiv 2501.15420), algorithm 1.

The network learns the guided prediction F_s(x | c, beta) itself: the loss takes the mix
beta F_s(x | c, beta) + (1 - beta) F(x | null, 1) as the conditional prediction. Hence F_s = F_u + (F_c - F_u) / beta, which is
guidance of scale 1 / beta in one forward pass. It works with every objective, since D is linear in F. N images, C channels,
H x W pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def guidance_free(predict: Callable, tensors: dict[str, dict[str, Tensor]], keep: dict[str, Tensor]) -> Tensor:
    """The mixed prediction (N, C, H, W) to give to any objective's loss; predict(tensors, keep) is a forward pass of the network.

    No gradient flows through the unconditional prediction. Where all conditions of a row are dropped, beta is 1, so that such
    rows train the unconditional prediction itself.
    """
    conditions = {kind: keep_N for kind, keep_N in keep.items() if kind != "temperature"}
    conditional_N = torch.stack(list(conditions.values())).any(0)
    beta_N = torch.where(conditional_N, tensors["temperature"]["beta_N"], 1.0)
    guided_NCHW = predict(tensors | {"temperature": {"beta_N": beta_N}}, keep)
    with torch.no_grad():
        nothing = {kind: torch.zeros_like(keep_N) for kind, keep_N in keep.items()}
        unconditional_NCHW = predict(tensors, nothing)
    beta_N111 = beta_N[:, None, None, None].to(guided_NCHW.dtype)
    return beta_N111 * guided_NCHW + (1 - beta_N111) * unconditional_NCHW
