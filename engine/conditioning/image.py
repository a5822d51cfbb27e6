"""Images as conditions: channels beside the noisy image. A class map, a low-resolution image, an image with a hole.

N images, H x W pixels, C channels of the image, K channels added, L classes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duotone.data.batch import Batch, to_device, to_plus_minus_one
from duotone.data.refusal import Refused, at_least
from duotone.engine import draws
from duotone.engine.conditioning.base import Conditioner, Conditioning, Facts
from duotone.engine.conditioning.label import class_index, classes_of, one_hot
from duotone.engine.model.unet import UNetConfig
from duotone.engine.pictures import pixels


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """One class per image, as channels that are the same at every pixel."""

    kind = "class_map"
    port = "channels"

    encoding: Literal["embedding", "one_hot"] = "embedding"
    """A learned row per class, the null class included; or one channel per class, all zero for the null class."""
    width: int = 4
    """Channels of the learned row."""
    dropout: float = 0.1
    """Share of labels replaced by the null class in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "ClassMapConditioner":
        at_least("conditioning: ClassMap.width", self.width, 1)
        return ClassMapConditioner(self, classes_of(facts))


@dataclass(frozen=True, kw_only=True)
class LowResolution:
    """The image itself, shrunk and enlarged again: the network learns to sharpen it. Saharia et al. 2021, section 2.4 (here bilinear)."""

    kind = "low_resolution"
    port = "channels"

    factor: int = 4
    """How many times smaller the sides of the shrunk image are."""
    dropout: float = 0.1
    """Share of images replaced by the null condition (grey) in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "LowResolutionConditioner":
        at_least("conditioning: LowResolution.factor", self.factor, 1)
        return LowResolutionConditioner(self, network.in_channels)


@dataclass(frozen=True, kw_only=True)
class Hole:
    """The image with a rectangle cut out, and the mask of what is cut: the network learns to fill it."""

    kind = "hole"
    port = "channels"

    dropout: float = 0.1
    """Share of images replaced by the null condition (all cut out) in training."""

    def build(self, network: UNetConfig, facts: Facts) -> "HoleConditioner":
        return HoleConditioner(self, network.in_channels)


class ClassMapConditioner(Conditioner):
    """The class as K channels of 1 x 1 pixels, which are the same at every pixel."""

    kind, keyword = "class_map", "labels"

    def __init__(self, config: ClassMap, classes: tuple[str, ...]):
        super().__init__()
        self.classes, self.dropout = classes, config.dropout
        self.extra_channels = config.width if config.encoding == "embedding" else len(classes)
        self.embedding = nn.Embedding(len(classes) + 1, config.width) if config.encoding == "embedding" else None

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        return {"labels_N": batch.labels_N}

    def of_values(self, values: list[int | str], size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        return {"labels_N": torch.tensor([class_index(value, self.classes) for value in values])}

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        rows_N = torch.where(keep_N, tensors["labels_N"], len(self.classes))
        if self.embedding is None:
            rows_NK = one_hot(rows_N, len(self.classes), torch.float32)
        else:
            rows_NK = self.embedding(rows_N)
        return Conditioning(channels_NKHW=rows_NK[:, :, None, None])


class LowResolutionConditioner(Conditioner):
    """The enlarged image as C channels; the null condition is grey, which is zero."""

    kind, keyword, spatial = "low_resolution", "images", True
    placeholder = None

    def __init__(self, config: LowResolution, channels: int):
        super().__init__()
        self.factor, self.dropout, self.extra_channels = config.factor, config.dropout, channels

    def shrunk(self, x_NCHW: Tensor) -> Tensor:
        height, width = x_NCHW.shape[2:]
        return F.adaptive_avg_pool2d(x_NCHW, (max(1, height // self.factor), max(1, width // self.factor)))

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        x_NCHW = to_plus_minus_one(batch.images_NHWC)
        return {"image_NCHW": enlarged(self.shrunk(x_NCHW), x_NCHW.shape[2:])}

    def values_of(self, images_NHWC: np.ndarray, seed: int = 0) -> list[np.ndarray]:
        return list(pixels(self.shrunk(to_plus_minus_one(torch.from_numpy(images_NHWC)))))

    def of_values(self, values: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        rows = [torch.zeros(1, self.extra_channels, *size) if v is None else self.row(v, size) for v in values]
        return {"image_NCHW": torch.cat(rows)}

    def row(self, value, size: tuple[int, int]) -> Tensor:
        image_HWC = pixels_of(value, self.extra_channels)
        (height, width), (h, w) = size, image_HWC.shape[:2]
        if abs(h * width - w * height) >= max(height, width):  # off by a pixel of the small image or more
            raise Refused(
                f"low resolution: an image of {h} x {w} has another aspect ratio than {size}: crop it, or set size"
            )
        return enlarged(to_plus_minus_one(image_HWC[None]), size)

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        return Conditioning(channels_NKHW=tensors["image_NCHW"] * keep_N[:, None, None, None])


class HoleConditioner(Conditioner):
    """The image outside the hole as C channels, then the mask, 1 inside; the null condition is all hole."""

    kind, keyword, spatial = "hole", "holes", True
    placeholder = None

    def __init__(self, config: Hole, channels: int):
        super().__init__()
        self.channels, self.dropout, self.extra_channels = channels, config.dropout, channels + 1

    def of_batch(self, batch: Batch, seed: int = 0) -> dict[str, Tensor]:
        _, height, width, _ = batch.images_NHWC.shape
        u_N4 = draws.uniform(seed, batch.positions_N, draws.Purpose.HOLE, 4)
        mask_N1HW = to_device(rectangles(u_N4, height, width), batch.images_NHWC.device)
        return {"image_NCHW": to_plus_minus_one(batch.images_NHWC), "mask_N1HW": mask_N1HW}

    def values_of(self, images_NHWC: np.ndarray, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
        count, height, width, _ = images_NHWC.shape
        masks_N1HW = rectangles(draws.uniform(seed, np.arange(count), draws.Purpose.HOLE, 4), height, width)
        return [(image, mask) for image, mask in zip(images_NHWC, masks_N1HW[:, 0].numpy())]

    def of_values(self, values: list, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        pairs = [self.all_hole(size) if value is None else self.pair(value, size) for value in values]
        return {"image_NCHW": torch.stack([i for i, _ in pairs]), "mask_N1HW": torch.stack([m for _, m in pairs])}

    def all_hole(self, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        return torch.zeros(self.channels, *size), torch.ones(1, *size, dtype=torch.bool)

    def pair(self, value, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """An image and its mask, (C, H, W) and (1, H, W); raises Refused if either is not of the size being sampled."""
        image_HWC, mask_HW = pixels_of(value[0], self.channels), torch.as_tensor(np.array(value[1])).bool()
        if image_HWC.shape[:2] != size or mask_HW.shape != size:
            raise Refused(
                f"hole: image {tuple(image_HWC.shape[:2])} and mask {tuple(mask_HW.shape)}, but {size} is sampled: "
                "give both that size, or set size to theirs"
            )
        return to_plus_minus_one(image_HWC[None])[0], mask_HW[None]

    def forward(self, tensors: dict[str, Tensor], keep_N: Tensor) -> Conditioning:
        mask_N1HW = tensors["mask_N1HW"] | ~keep_N[:, None, None, None]
        image_NCHW = tensors["image_NCHW"] * ~mask_N1HW
        return Conditioning(channels_NKHW=torch.cat([image_NCHW, mask_N1HW.to(image_NCHW.dtype)], dim=1))


def enlarged(x_NCHW: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x_NCHW, size=size, mode="bilinear", align_corners=False)


def rectangles(u_N4: Tensor, height: int, width: int) -> Tensor:
    """Masks (N, 1, H, W), each of one rectangle with sides between a quarter and three quarters of the image's."""
    extent_N2 = 0.25 + 0.5 * u_N4[:, :2]
    first_N2 = u_N4[:, 2:] * (1 - extent_N2)
    inside = []
    for axis, side in enumerate((height, width)):
        centre_S = (torch.arange(side, dtype=u_N4.dtype, device=u_N4.device) + 0.5) / side
        first_N1 = first_N2[:, axis, None]
        inside.append((centre_S >= first_N1) & (centre_S < first_N1 + extent_N2[:, axis, None]))
    return (inside[0][:, :, None] & inside[1][:, None, :])[:, None]


def pixels_of(value, channels: int) -> Tensor:
    """One image as uint8 (H, W, C): an array of that shape, or an open picture."""
    image = torch.as_tensor(np.array(value))
    image = image[..., None] if image.dim() == 2 else image
    if image.dim() != 3 or image.shape[2] != channels or image.dtype != torch.uint8 or image.numel() == 0:
        raise Refused(f"image of shape {tuple(image.shape)} and type {image.dtype}: give uint8 (H, W, {channels})")
    return image
