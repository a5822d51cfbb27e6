"""MNIST's idx files (gzipped or not) -> shards: gray images, labels, and captions from the class names."""

import gzip
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from duotone.data.image_header import MAX_PIXELS
from duotone.data.prepare.picture_files import class_caption
from duotone.data.refusal import Refused
from duotone.data.write_shards import Sample, write_shards

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
GARMENTS = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
KNOWN = {"mnist": (DIGITS, "the handwritten digit {}"), "fashion-mnist": (GARMENTS, "a photo of a {}")}
UNSIGNED_BYTE = 8


@dataclass(frozen=True, kw_only=True)
class PrepareIdx:
    """MNIST, Fashion-MNIST and other sets in their format."""

    images: Path
    """The idx3-ubyte file, .gz or not."""
    out: Path
    """Folder to write; it must not exist."""
    labels: Path | None = None
    """The idx1-ubyte file, .gz or not."""
    names: Literal["mnist", "fashion-mnist"] | None = None
    """Use the class names of this known set."""
    classes: tuple[str, ...] | None = None
    """Your own class names, in the order of the labels."""
    caption: str | None = None
    """Caption, with {} for the class name; by default that of --names, or "a photo of a {}"."""
    image_format: Literal["npy", "png"] = "npy"
    """npy is stored decoded, so reading only slices it; png is smaller."""
    per_shard: int = 16384
    """Samples per shard."""
    limit: int | None = None
    """Take only the first `limit` images."""

    def __post_init__(self):
        for name in ("per_shard", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"{name} is {value}: use 1 or more")
        if self.names and self.classes:
            raise Refused("names and classes are both given: use one of them")
        for name in ("names", "classes", "caption"):
            if self.labels is None and getattr(self, name) is not None:
                raise Refused(f"{name} is given without labels, which it describes: give --labels too, or leave it out")

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file."""
        images_NHW = read_idx(self.images, dimensions=3)[: self.limit]
        labels_N = self._labels(images_NHW)
        classes = self._classes(labels_N)
        samples = tqdm(self._samples(images_NHW, labels_N, classes), total=len(images_NHW), unit="image", disable=None)
        about = {"made_by": "prepare idx", "names": self.names}
        content = write_shards(
            samples, self.out, classes=classes, per_shard=self.per_shard, image_format=self.image_format, about=about
        )
        summary = {"out": str(self.out), "images": content["count"], "shards": len(content["shards"])}
        return summary | {"classes": classes, "size": list(images_NHW.shape[1:])}

    def _labels(self, images_NHW: np.ndarray) -> np.ndarray | None:
        if self.labels is None:
            return None
        labels_N = read_idx(self.labels, dimensions=1)[: self.limit]
        if len(labels_N) != len(images_NHW):
            raise Refused(
                f"{self.labels}: {len(labels_N)} labels for {len(images_NHW)} images; give the matching files"
            )
        return labels_N

    def _classes(self, labels_N: np.ndarray | None) -> list[str] | None:
        if labels_N is None:
            return None
        highest = int(labels_N.max())
        named = KNOWN[self.names][0] if self.names else self.classes
        if named is not None and highest >= len(named):
            raise Refused(f"{self.labels}: label {highest} has no name, {len(named)} are given; name every class")
        return list(named) if named is not None else [str(label) for label in range(highest + 1)]

    def _samples(self, images_NHW: np.ndarray, labels_N: np.ndarray | None, classes) -> Iterator[Sample]:
        template = self.caption or (KNOWN[self.names][1] if self.names else "a photo of a {}")
        for number, image_HW in enumerate(images_NHW):
            label = None if labels_N is None else int(labels_N[number])
            captions = [] if label is None else [class_caption(template, classes[label])]
            yield Sample(image=image_HW[:, :, None], captions=captions, label=label)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The array of an idx file, uint8; raises Refused for another format, type or length."""
    try:
        with path.open("rb") as file:
            zipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path) if zipped else path.open("rb") as file:
            shape = _shape(path, file.read(4 + 4 * dimensions), dimensions)
            data = file.read(math.prod(shape) + 1)  # one byte more shows a mismatch without unpacking a bomb
    except (EOFError, zlib.error, gzip.BadGzipFile):  # BadGzipFile is an OSError too, so it must come first
        raise Refused(f"{path}: it is truncated or damaged; download it again") from None
    except OSError as error:
        raise Refused(f"{path}: it cannot be read ({error.strerror or error}); check the path") from None
    if len(data) != math.prod(shape):
        raise Refused(f"{path}: it does not hold the {math.prod(shape)} bytes its header says; download it again")
    return np.frombuffer(data, dtype=np.uint8).reshape(shape)


def _shape(path: Path, header: bytes, dimensions: int) -> tuple[int, ...]:
    if header[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]) or len(header) != 4 + 4 * dimensions:
        kind = "images" if dimensions == 3 else "labels"
        raise Refused(f"{path}: it is not an idx{dimensions}-ubyte file of {kind}; check the path")
    shape = tuple(np.frombuffer(header, dtype=">u4", offset=4).tolist())
    if min(shape) < 1 or math.prod(shape[1:]) > MAX_PIXELS or math.prod(shape) > 2**34:
        raise Refused(f"{path}: its header says {shape}, which cannot be right; download it again")
    return shape
