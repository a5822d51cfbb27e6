"""Real images and their conditions, read whole into memory, against which a model is measured.

N images of H x W pixels and C channels, K attributes.
"""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from duotone.data.batch import Batch, Plan
from duotone.data.dataset import Dataset
from duotone.data.held_out import Part
from duotone.data.order import samples_at
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine.evaluate.progress import Progress

CHUNK = 512
STAND_IN = "a tenth of the training set, seen in training by the model"
SHARE_OF_STAND_IN = 10  # one image in ten


@dataclass(frozen=True, kw_only=True)
class Images:
    """N images with their labels, attributes and captions, if the data has them."""

    images_NHWC: np.ndarray  # uint8
    fingerprint: str
    """Changes when the data or its framing changes."""
    labels_N: np.ndarray | None = None
    attributes_NK: np.ndarray | None = None  # 1 present, 0 absent, -1 unknown
    captions: list[str] | None = None
    classes: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None
    there_are: int | None = None
    """Number of images in the data that these were read from, if known."""

    def __len__(self) -> int:
        return len(self.images_NHWC)

    def take(self, places_M: np.ndarray) -> "Images":
        """These images, in this order."""
        return replace(
            self,
            images_NHWC=self.images_NHWC[places_M],
            labels_N=None if self.labels_N is None else self.labels_N[places_M],
            attributes_NK=None if self.attributes_NK is None else self.attributes_NK[places_M],
            captions=None if self.captions is None else [self.captions[i] for i in places_M.tolist()],
        )

    def spread(self) -> np.ndarray:
        """An order in which every prefix has the classes in their shares; the given order if there are no labels."""
        return np.arange(len(self)) if self.labels_N is None else spread(self.labels_N)

    def drawn(self, count: int) -> "Images":
        """`count` of the images, in which every class keeps its share."""
        return self.take(self.spread()[:count])

    def batch(self, rows: slice, device: torch.device) -> Batch:
        """Some of the images as a training batch, whose positions are places in this set."""
        places_M = np.arange(len(self))[rows]
        return Batch(
            positions_N=places_M,
            keys=[str(place) for place in places_M.tolist()],
            images_NHWC=torch.from_numpy(self.images_NHWC[rows]).to(device),
            captions=None if self.captions is None else self.captions[rows],
            labels_N=None if self.labels_N is None else torch.from_numpy(self.labels_N[rows]),
            attributes_NK=None if self.attributes_NK is None else torch.from_numpy(self.attributes_NK[rows]),
        )


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The images that the model was trained on, and other real images to compare with."""

    train: Images
    """The reference: training images, without those that serve as a test set."""
    held_out: Images
    held_out_is: str
    """"test", "validation", or a remark that these are training images too."""
    seen: Images
    """Every image that the model may have seen."""
    validation: Images | None = None
    """The images that the run held out, if there is a test set besides."""

    @property
    def is_apart(self) -> bool:
        """Whether no held-out image was trained on."""
        return self.held_out_is != STAND_IN

    @property
    def held_out_said(self) -> str:
        """What the held-out images are, to be put into a sentence."""
        return f"the {self.held_out_is} set" if self.is_apart else self.held_out_is

    @property
    def parts(self) -> dict[str, Images]:
        """Every set that samples are measured against."""
        between = {} if self.validation is None else {"validation": self.validation}
        return {"train": self.train, **between, "held_out": self.held_out}

    @property
    def fingerprint(self) -> str:
        return "-".join(f"{images.fingerprint}-{len(images)}" for images in self.parts.values())


def spread(labels_N: np.ndarray) -> np.ndarray:
    """Places (N,), ordered by each image's relative position in its own class, so that every prefix has the classes in their shares."""
    rank_N = np.empty(len(labels_N))
    for label in np.unique(labels_N):
        places_M = np.flatnonzero(labels_N == label)
        rank_N[places_M] = (np.arange(len(places_M)) + 0.5) / len(places_M)
    return np.argsort(rank_N, kind="stable")


def read_splits(shards: Shards, test: Path | None, most: int) -> Splits:
    """All sets, with at most `most` images each.

    Without a test set, the images that the run held out take its place; if it held out none, a tenth of the training set does.
    """
    inside = shards.shards / "test" if shards.shards and (shards.shards / "test").is_dir() else None
    seen = read_images(shards, most, "training set")
    validation = read_images(shards, most, "validation set", "held out") if shards.held_out else None
    folder = test or inside
    if folder is not None:
        held_out = read_images(replace(shards, shards=folder, held_out=0.0), most, "test set")
        refuse_unlike_sets(shards.shards, seen, folder, held_out)
        if fingerprint(replace(shards, shards=folder)) == fingerprint(shards):
            raise Refused(f"{folder} holds what the model was trained on, and is no test set: give --test other shards")
        return Splits(train=seen, held_out=held_out, held_out_is="test", seen=seen, validation=validation)
    if validation is not None:
        return Splits(train=seen, held_out=validation, held_out_is="validation", seen=seen)
    middle = len(seen) - len(seen) // SHARE_OF_STAND_IN
    train, stand_in = (seen.take(order_M) for order_M in np.split(np.arange(len(seen)), [middle]))
    return Splits(train=train, held_out=stand_in, held_out_is=STAND_IN, seen=seen)


def refuse_unlike_sets(folder: Path, train: Images, test_folder: Path, test: Images) -> None:
    for name in ("classes", "attributes"):
        ours, theirs = getattr(train, name), getattr(test, name)
        if ours != theirs:
            raise Refused(f"{test_folder} has other {name} than {folder} ({theirs} and {ours}): give matching sets")
    for name, column in (("labels", "labels_N"), ("attributes", "attributes_NK")):
        given = [
            folder if getattr(images, column) is not None else None
            for folder, images in ((folder, train), (test_folder, test))
        ]
        if given.count(None) == 1:
            having = given[0] or given[1]
            raise Refused(f"of {folder} and {test_folder} only {having} has {name}: give matching sets")


def fingerprint(shards: Shards) -> str:
    """The fingerprint of all the data in a folder, whichever part of it is held out."""
    data = shards.open(torch.device("cpu"), part="all")
    data.close()
    return data.fingerprint


def refuse_other_split(shards: Shards, held_out: list[str], said_in: Path) -> None:
    """Raises Refused unless all samples that a run held out are held out here, by key.

    With other data or renamed samples it would not be known which samples were trained on.
    """
    gone = set(held_out) - set(shards.held_out_keys())
    if gone:
        raise Refused(
            f"{said_in} names {len(held_out):,} samples that were not trained on, and {len(gone):,} of them are not held out of "
            f"{shards.shards} (such as {min(gone)!r}): give --data.shards the data it was trained on"
        )


def read_images(shards: Shards, most: int, what: str, part: Part = "training") -> Images:
    """At most `most` images in a fixed shuffled order; raises Refused on data that cannot be used."""
    data = shards.open(torch.device("cpu"), part=part)
    try:
        count = min(data.count, most)
        order_N = samples_at(0, np.arange(count), data.count)
        progress = Progress(f"reading the {what}", count)
        batches = []
        for first in range(0, count, CHUNK):
            batches.append(data.read(centred(order_N[first : first + CHUNK])))
            progress.at(min(first + CHUNK, count))
    finally:
        data.close()
    return joined(batches, data, framing(shards))


def centred(samples_N: np.ndarray) -> Plan:
    """A plan that reads these samples with a centre crop and the first caption."""
    n = len(samples_N)
    return Plan(positions_N=np.arange(n), samples_N=samples_N, crops_N2=np.full((n, 2), 0.5), captions_N=np.zeros(n))


def framing(shards: Shards) -> str:
    """The settings that change the pixels of the same data."""
    return f"{shards.size}-{shards.pad}-{shards.channels}-{shards.resize}-{shards.crop}"


def turned(data: Dataset) -> str:
    """A digest of the pictures' orientations if any picture is turned: they depend on how headers are read."""
    orientation_N = data.columns["orientation"]
    return f"-{zlib.crc32(orientation_N.tobytes()):08x}" if (orientation_N != 1).any() else ""


def joined(batches: list[Batch], data: Dataset, frame: str) -> Images:
    first = batches[0]

    def column(name: str) -> np.ndarray | None:
        parts = [getattr(batch, name) for batch in batches]
        return None if parts[0] is None else torch.cat(parts).numpy()

    return Images(
        images_NHWC=column("images_NHWC"),
        fingerprint=f"{data.fingerprint}-{frame}{turned(data)}",
        labels_N=column("labels_N"),
        attributes_NK=column("attributes_NK"),
        captions=None if first.captions is None else [text for batch in batches for text in batch.captions],
        classes=tuple(data.classes) if data.classes else None,
        attributes=tuple(data.attributes) if data.attributes else None,
        there_are=data.count,
    )
