"""CIFAR-10 as its authors publish it, binary or Python version -> shards.

The Python version is a pickle; its unpickler accepts numpy arrays and plain values, and nothing else.
"""

import io
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from duotone.data.prepare.picture_files import check_folder, class_caption
from duotone.data.refusal import Refused
from duotone.data.write_shards import Sample, write_shards

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}
PIXELS = 3 * 32 * 32
RECORDS = 10000  # in each file, as published
MAX_BYTES = 1 << 26  # a batch file has 31 MB
ALLOWED = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}
ALLOWED |= {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}
BUFFERED = {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}  # in pickles of protocol 5


@dataclass(frozen=True, kw_only=True)
class PrepareCifar10:
    """CIFAR-10 from cifar-10-batches-bin or cifar-10-batches-py."""

    source: Path
    """The unpacked folder."""
    out: Path
    """Folder to write; it must not exist."""
    split: Literal["train", "test"] = "train"
    """train has 50,000 images, test 10,000."""
    caption: str = "a photo of a {}"
    """Caption, with {} for the class name."""
    image_format: Literal["npy", "png"] = "npy"
    """npy is stored decoded, so reading only slices it; png is smaller."""
    per_shard: int = 10000
    """Samples per shard."""

    def __post_init__(self):
        if self.per_shard < 1:
            raise Refused(f"per_shard is {self.per_shard}: use 1 or more")

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file."""
        check_folder(self.source, "source")
        batches = [self._batch(name) for name in BATCHES[self.split]]
        counts = {name: len(labels_N) for name, (_, labels_N) in zip(BATCHES[self.split], batches)}
        self._refuse_cut(counts)
        total = sum(counts.values())
        samples = tqdm(self._samples(batches), total=total, unit="image", disable=None)
        about = {"made_by": "prepare cifar10", "split": self.split}
        content = write_shards(
            samples, self.out, classes=CLASSES, per_shard=self.per_shard, image_format=self.image_format, about=about
        )
        short = [f"{name}: {count:,} of {RECORDS:,} images" for name, count in counts.items() if count != RECORDS]
        summary = {"out": str(self.out), "images": content["count"], "shards": len(content["shards"])}
        return summary | {"classes": CLASSES, "short": short}

    def _refuse_cut(self, counts: dict[str, int]) -> None:
        """Raises Refused if files differ in their number of images; a subset of the set must be cut evenly."""
        least, most = min(counts, key=counts.get), max(counts, key=counts.get)
        if counts[least] < counts[most]:
            found = f"{least} holds {counts[least]:,} images and {most} {counts[most]:,}"
            raise Refused(f"{self.source}: {found}; download it again")

    def _batch(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        binary, pickled = self.source / f"{name}.bin", self.source / name
        if binary.is_file():
            return _from_binary(binary, _bytes(binary))
        if pickled.is_file():
            return _from_pickle(pickled, _bytes(pickled))
        raise Refused(f"{self.source}: neither {name}.bin nor {name} is there; give the unpacked CIFAR-10 folder")

    def _samples(self, batches: list[tuple[np.ndarray, np.ndarray]]) -> Iterator[Sample]:
        for images_NHWC, labels_N in batches:
            for image_HWC, label in zip(images_NHWC, labels_N.tolist()):
                yield Sample(image=image_HWC, captions=[class_caption(self.caption, CLASSES[label])], label=label)


def _bytes(path: Path) -> bytes:
    if path.stat().st_size > MAX_BYTES:
        raise Refused(f"{path}: it is larger than any batch of CIFAR-10; download it again")
    return path.read_bytes()


def _from_binary(path: Path, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels from records of one label byte and 3072 pixel bytes: a red, a green and a blue plane."""
    if not raw or len(raw) % (1 + PIXELS):
        raise Refused(f"{path}: it is not a whole number of CIFAR-10 records; download it again")
    records_NB = np.frombuffer(raw, dtype=np.uint8).reshape(-1, 1 + PIXELS)
    return _checked(path, records_NB[:, 1:], records_NB[:, 0])


def _from_pickle(path: Path, raw: bytes) -> tuple[np.ndarray, np.ndarray]:
    content = read_pickled_arrays(path, raw)
    pixels, labels = (content.get(name, content.get(name.encode())) for name in ("data", "labels"))
    if not (isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.ndim == 2):
        raise Refused(f"{path}: it is not a batch of CIFAR-10; download it again")
    if not (isinstance(labels, list) and all(type(label) is int and 0 <= label < 256 for label in labels)):
        raise Refused(f"{path}: it is not a batch of CIFAR-10; download it again")
    return _checked(path, pixels, np.array(labels, dtype=np.uint8))


def _checked(path: Path, pixels_NB: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if pixels_NB.shape != (len(labels_N), PIXELS) or not len(labels_N) or labels_N.max() >= len(CLASSES):
        raise Refused(f"{path}: its labels or pixels are not those of CIFAR-10; download it again")
    return pixels_NB.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels_N


def read_pickled_arrays(path: Path, raw: bytes) -> dict:
    """A pickled dictionary of arrays and plain values; raises Refused before anything else in the pickle is created."""
    try:
        content = _ArraysOnly(io.BytesIO(raw), encoding="bytes").load()
    except Refused as refusal:
        raise Refused(f"{path}: {refusal}") from None
    except Exception as error:  # a damaged pickle can raise almost anything
        raise Refused(f"{path}: it is damaged ({type(error).__name__}); download it again") from None
    if not isinstance(content, dict):
        raise Refused(f"{path}: it is not a batch of CIFAR-10; download it again")
    return content


def _from_buffer(buffer, dtype, shape, order, axis_order=None) -> np.ndarray:
    """The same array as numpy's _frombuffer returns, but from plain bytes only; raises ValueError."""
    if not isinstance(buffer, bytes | bytearray):  # another array may hold pointers, which must not be exposed
        raise ValueError("an array's buffer is not bytes")
    array = np.frombuffer(bytes(buffer), dtype=dtype)  # raises on object types
    return array.reshape(shape, order="C").transpose(axis_order) if order == "K" else array.reshape(shape, order=order)


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        if (module, name) in BUFFERED:
            return _from_buffer
        if (module, name) not in ALLOWED:
            raise Refused(f"the pickle asks for {module}.{name}, which no CIFAR-10 file needs; do not trust this file")
        return super().find_class(module, name)
