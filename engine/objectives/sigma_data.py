"""sigma_data, the standard deviation of a data set's pixels, measured."""

import numpy as np

from duotone.data.dataset import Dataset
from duotone.data.refusal import Refused
from duotone.engine import draws


def measured_sigma_data(data: Dataset, images: int = 10_000, at_once: int = 250) -> float:
    """The standard deviation of all pixels in [-1, 1] over up to `images` samples, cropped and resized as in training."""
    count, total, squares = 0, 0.0, 0.0
    for first in range(0, min(images, data.count), at_once):
        positions_N = np.arange(first, min(first + at_once, images, data.count), dtype=np.int64)
        pixels = data.read(draws.plan(0, positions_N, data.count)).images_NHWC.double() / 127.5 - 1
        count, total, squares = (
            count + pixels.numel(),
            total + pixels.sum().item(),
            squares + pixels.square().sum().item(),
        )
    variance = squares / count - (total / count) ** 2
    if variance < 1e-9:
        raise Refused("every pixel of the data is the same: there is nothing to learn; check how the shards were made")
    return variance**0.5
