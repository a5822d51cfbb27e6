"""What every source takes and yields: a Plan says which samples to read and how, a Batch holds them.

N images, H x W pixels, C channels, K attributes.
"""

from dataclasses import dataclass, field

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to read for N positions of a run; every choice is already made, so reading draws nothing at random."""

    positions_N: np.ndarray  # int64, images since the start of the run
    samples_N: np.ndarray  # int64, index into the data set
    crops_N2: np.ndarray  # float64 in [0, 1), top and left of the crop as a share of the range they can take
    captions_N: np.ndarray  # float64 in [0, 1), which caption: floor(u * number of captions)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """N decoded samples; pixels stay uint8 until the network's input is made from them."""

    positions_N: np.ndarray  # int64, copied from the plan
    keys: list[str]  # sample keys, for traces and messages
    images_NHWC: torch.Tensor  # uint8
    captions: list[str] | None = None
    labels_N: torch.Tensor | None = None  # int64, class index
    attributes_NK: torch.Tensor | None = None  # int8: 1 present, 0 absent, -1 unknown
    skipped: list[str] = field(default_factory=list)  # "key: reason" of samples that could not be read


TAKEN_AT_ONCE = 1 << 16  # bytes that CUDA's driver buffers before the call returns


def to_plus_minus_one(images_NHWC: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as floats in [-1, 1], (N, C, H, W)."""
    return images_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_device(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The tensor on a device, its copy queued behind the work that is still running there.

    A plain copy would wait for that work to end, and the device would idle while the next step is prepared. The caller
    may overwrite the CPU's tensor at once: the driver has buffered its bytes or, if they are too many for that, reads
    them from the pinned copy made here.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu" and tensor.nbytes > TAKEN_AT_ONCE:
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
