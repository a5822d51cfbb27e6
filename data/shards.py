"""Indexed WebDataset shards: samples by number, their bytes guarded before any decoder sees them, batches ahead of time."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from duotone.data.ahead import Ahead
from duotone.data.batch import Batch, Plan
from duotone.data.framing import Crop, Resize, boxes
from duotone.data.pillow import PillowDecoder, Undecodable, cut_stored
from duotone.data.refusal import Refused
from duotone.data.sample_text import SampleText, read_text
from duotone.data.tar_index import COLUMNS, KINDS, TarIndex, index_path, map_bytes, open_index

STORED = KINDS.index("npy")
REMEDY = "write or download it again, or pass --data.on-bad replace to read the next sample instead"


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Where the training images are and how each becomes a square of pixels."""

    shards: Path | None = None
    """Folder of WebDataset shards (*.tar), made by `duotone prepare`, img2dataset or tar."""
    size: int = 128
    """Side of the training images, pixels."""
    channels: int = 3
    """3 colour, 1 gray."""
    resize: Resize = "crop"
    """crop: short side to size, then a square; squash: the whole frame; none: stored at this size already."""
    crop: Crop = "center"
    """Which square is cut where one side is longer."""
    pad: int = 0
    """Black border inside `size`, pixels a side: size 32 and pad 2 hold images of 28."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """What decodes JPEG, PNG and WebP; auto takes DALI where it is installed."""
    threads: int = 2
    """Threads that decode on the CPU."""
    on_bad: Literal["refuse", "replace"] = "refuse"
    """An image that cannot be read: stop, or take the next sample and count it."""

    def __post_init__(self):
        if self.channels not in (1, 3):
            raise Refused(f"data.channels is {self.channels}: use 3 (colour) or 1 (gray)")
        if self.size < 1 or self.pad < 0 or self.side < 1:
            raise Refused(f"data.size is {self.size} with data.pad {self.pad}: at least one pixel must remain")
        if self.threads < 1:
            raise Refused(f"data.threads is {self.threads}: use at least 1")

    @property
    def side(self) -> int:
        """Side of the image inside its border, pixels."""
        return self.size - 2 * self.pad

    def open(self, device: torch.device, require_captions: bool = False) -> "Dataset":
        """Checks every shard and indexes those without an index; raises Refused naming shard, key and remedy."""
        paths = _shard_paths(self.shards)
        manifest = Manifest.beside(self.shards, paths)
        indexes = _open_indexes(paths)
        manifest.check(paths, indexes)
        dataset = Dataset(self, device, paths, indexes, manifest)
        dataset.check(require_captions)
        dataset.start()
        return dataset


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """dataset.json, which names what the shards must hold; a folder without one is taken as it is."""

    path: Path
    classes: list[str] | None = None
    attributes: list[str] | None = None
    shards: dict[str, str] | None = None  # file name -> fingerprint
    note: str | None = None

    @classmethod
    def beside(cls, folder: Path, paths: list[Path]) -> "Manifest":
        """Reads dataset.json and compares its list of shards with the files; raises Refused."""
        path = folder / "dataset.json"
        if not path.is_file():
            return cls(path=path)
        try:
            content = json.loads(path.read_text("utf-8"))
            if content.get("format") != "duotone-shards":
                return cls(path=path, note=f"{path} is not ours and is not used")
            manifest = cls(
                path=path, classes=content["classes"], attributes=content["attributes"], shards=content["shards"]
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise Refused(f"{path}: it is damaged; run `duotone prepare` again, or delete it") from None
        manifest._check_names({shard.name for shard in paths})
        return manifest

    def _check_names(self, present: set[str]) -> None:
        missing, added = sorted(set(self.shards) - present), sorted(present - set(self.shards))
        if missing:
            raise Refused(f"{self.path.parent}: {missing[0]} is missing, dataset.json names it; copy the folder again")
        if added:
            raise Refused(
                f"{self.path.parent}: {added[0]} is not named in dataset.json; move it away, or delete dataset.json"
            )

    def check(self, paths: list[Path], indexes: list[TarIndex]) -> None:
        """Raises Refused where a shard's content is not what was written."""
        for path, index in zip(paths, indexes):
            if self.shards is not None and self.shards[path.name] != index.fingerprint:
                raise Refused(
                    f"{path}: its content is not what dataset.json says; copy the shard again, or delete dataset.json"
                )


def _shard_paths(folder: Path | None) -> list[Path]:
    if folder is None:
        raise Refused("data.shards is not set: give a folder of .tar shards (make one with `duotone prepare`)")
    if folder.is_file():
        raise Refused(f"{folder}: it is a file; data.shards is the folder that holds the .tar shards")
    if not folder.is_dir():
        raise Refused(f"{folder}: there is no such folder; make shards with `duotone prepare`")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    if not paths:
        raise Refused(f"{folder}: it holds no .tar shards; make some with `duotone prepare`")
    return paths


def _open_indexes(paths: list[Path]) -> list[TarIndex]:
    missing = sum(not index_path(path).exists() for path in paths)
    progress = tqdm(paths, desc="indexing shards", unit="shard", leave=False, disable=None if missing > 1 else True)
    return [open_index(path) for path in progress]


class Dataset:
    """Open shards: `count` samples by number, read as plans say."""

    def __init__(self, shards: Shards, device, paths: list[Path], indexes: list[TarIndex], manifest: Manifest):
        self.shards, self.device, self.paths = shards, torch.device(device), paths
        self.manifest, self.classes, self.attributes = manifest, manifest.classes, manifest.attributes
        counts = [len(index.keys) for index in indexes]
        self.count = sum(counts)
        self.keys = [key for index in indexes for key in index.keys]
        self.shard_N = np.repeat(np.arange(len(paths)), counts)
        self.columns = {name: np.concatenate([index.columns[name] for index in indexes]) for name in COLUMNS}
        self.fingerprint = _fingerprint(indexes, manifest)
        starts = np.cumsum([0, *counts])
        self.bad = {
            int(start) + place: reason for start, index in zip(starts, indexes) for place, reason in index.bad.items()
        }
        self.notes = [note for note in [manifest.note, *[index.note for index in indexes], _ignored(indexes)] if note]
        self.bytes = [map_bytes(path) for path in paths]
        self.trusted_N = np.zeros(self.count, dtype=bool)
        self._decoder, self.decoder_note = None, None

    # what is known without reading an image

    @cached_property
    def has_captions(self) -> bool:
        """Whether every sample has at least one caption."""
        return bool((self.columns["captions"] > 0).all())

    @cached_property
    def labels_N(self) -> np.ndarray | None:
        """Class of every sample, int64 (count,), or None where the shards hold none."""
        return self.columns["label"] if self.count and self.columns["label"].max() >= 0 else None

    def captions_at(self, sample: int) -> list[str]:
        """All captions of a sample."""
        return self._text(sample).captions

    def key_at(self, sample: int) -> str:
        """The key a sample has in its shard."""
        return self.keys[sample]

    @property
    def decoder(self) -> str:
        """What really decodes: "dali", "pillow", or "stored" where every image is stored decoded."""
        return self._decoder.name if self._decoder else "stored"

    def start(self) -> None:
        """Chooses the decoder; a substitution is told in decoder_note."""
        if (self.columns["kind"] != STORED).any():
            self._decoder, self.decoder_note = _decoder(self.shards, self.device)

    # reading

    def batches(self, plans: Iterable[Plan], ahead: int = 2) -> Iterator[Batch]:
        """Batches in the order of their plans, read `ahead` of time on a thread that also draws from `plans`."""
        return Ahead(map(self.read, plans), ahead)

    def read(self, plan: Plan) -> Batch:
        """One batch; raises Refused for an image that cannot be read, unless on_bad is "replace"."""
        while True:
            samples_N, skipped = self._readable(plan.samples_N)
            try:
                images_NHWC = self._images(samples_N, plan.crops_N2)
                break
            except Undecodable as bad:
                self._condemn(int(samples_N[bad.place]), bad.reason)
        captions, attributes_NK = self._texts(samples_N, plan.captions_N)
        return Batch(
            positions_N=plan.positions_N,
            keys=[self.keys[sample] for sample in samples_N],
            images_NHWC=images_NHWC,
            captions=captions,
            labels_N=None if self.labels_N is None else torch.from_numpy(self.labels_N[samples_N]),
            attributes_NK=attributes_NK,
            skipped=skipped,
        )

    def close(self) -> None:
        """Ends the decoder's threads and lets go of the shards."""
        if self._decoder:
            self._decoder.close()
        self.bytes = []

    # checks

    def check(self, require_captions: bool) -> None:
        """Raises Refused for the first sample that training would stumble over."""
        if not self.count:
            raise Refused(
                f"{self.shards.shards}: its shards hold no images (jpg, jpeg, png, webp or npy); check the folder"
            )
        if self.bad and self.shards.on_bad == "refuse":
            sample = min(self.bad)
            raise Refused(f"{self.where(sample)}: {self.bad[sample]}; {REMEDY}")
        self._check_captions(require_captions)
        self._check_labels()
        self._check_sizes()

    def where(self, sample: int) -> str:
        """A sample's shard and key, for messages."""
        return f"{self.paths[self.shard_N[sample]]}: key {self.keys[sample]!r}"

    def _first(self, failing_N: np.ndarray) -> int | None:
        failing_N = failing_N.copy()
        failing_N[list(self.bad)] = False
        return int(failing_N.argmax()) if failing_N.any() else None

    def _check_captions(self, require_captions: bool) -> None:
        sample = self._first(self.columns["captions"] == 0) if require_captions else None
        if sample is not None:
            remedy = "add a .txt beside every image, or train without text"
            if not (self.columns["captions"] > 0).any():
                raise Refused(f"{self.paths[self.shard_N[sample]]}: it has no captions; {remedy}")
            raise Refused(f"{self.where(sample)}: the image has no caption; {remedy}")

    def _check_labels(self) -> None:
        labels_N = self.columns["label"]
        sample = self._first(labels_N < 0) if self.labels_N is not None else None
        if sample is not None:
            raise Refused(f"{self.where(sample)}: it has no label but others do; label every sample or none")
        sample = self._first(labels_N >= len(self.classes)) if self.classes is not None else None
        if sample is not None:
            raise Refused(
                f"{self.where(sample)}: label {labels_N[sample]} has no name among {len(self.classes)} classes; correct dataset.json"
            )
        sample = self._first(self.columns["attributes"] != len(self.attributes)) if self.attributes else None
        if sample is not None:
            raise Refused(
                f"{self.where(sample)}: it has {self.columns['attributes'][sample]} attributes, dataset.json names {len(self.attributes)}"
            )

    def _check_sizes(self) -> None:
        side = self.shards.side
        wrong_N = (self.columns["height"] != side) | (self.columns["width"] != side)
        sample = self._first(wrong_N) if self.shards.resize == "none" else None
        if sample is not None:
            found = f"{self.columns['width'][sample]} x {self.columns['height'][sample]}"
            raise Refused(
                f"{self.where(sample)}: the image is {found}, not {side} x {side}; use --data.resize crop, or another --data.size"
            )

    # one batch

    def _readable(self, planned_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The planned samples, each bad one replaced by the next good one, and what was replaced."""
        if not self.bad:
            return planned_N, []
        if len(self.bad) >= self.count:
            raise Refused(f"{self.shards.shards}: not one image can be read; the first: {self.bad[min(self.bad)]}")
        samples_N, skipped = planned_N.copy(), []
        for place, planned in enumerate(planned_N.tolist()):
            sample = planned
            while sample in self.bad:
                sample = (sample + 1) % self.count
            if sample != planned:
                skipped.append(f"{self.keys[planned]}: {self.bad[planned]}")
            samples_N[place] = sample
        return samples_N, skipped

    def _condemn(self, sample: int, reason: str) -> None:
        if self.shards.on_bad == "refuse":
            raise Refused(f"{self.where(sample)}: {reason}; {REMEDY}")
        self.bad[sample] = reason

    def _images(self, samples_N: np.ndarray, crops_N2: np.ndarray) -> torch.Tensor:
        """Images uint8 (N, size, size, channels) on the device, border included."""
        side, columns = self.shards.side, self.columns
        encoded = [self._guarded(place, sample) for place, sample in enumerate(samples_N.tolist())]
        sides_N2 = np.stack([columns["height"][samples_N], columns["width"][samples_N]], axis=1)
        orientations_N = columns["orientation"][samples_N]
        drawn_N2 = crops_N2 if self.shards.crop == "random" else None
        boxes_N4 = boxes(sides_N2, orientations_N, drawn_N2, self.shards.resize)
        stored_N = columns["kind"][samples_N] == STORED
        if not stored_N.any():
            inner_NHWC = self._decode(encoded, boxes_N4, orientations_N)
        else:
            inner_NHWC = torch.empty((len(encoded), side, side, self.shards.channels), dtype=torch.uint8)
            self._slice(inner_NHWC.numpy(), np.flatnonzero(stored_N), samples_N, encoded, boxes_N4)
            if not stored_N.all():
                self._decode_some(inner_NHWC, np.flatnonzero(~stored_N), encoded, boxes_N4, orientations_N)
        return self._bordered(inner_NHWC.to(self.device, non_blocking=True))

    def _guarded(self, place: int, sample: int) -> np.ndarray:
        """An image's bytes as they lie in the mapped shard; checked against the index the first time they are used."""
        columns = self.columns
        start, size = int(columns["image_offset"][sample]), int(columns["image_size"][sample])
        encoded_B = self.bytes[self.shard_N[sample]][start : start + size]
        if not self.trusted_N[sample]:
            if zlib.crc32(encoded_B) != columns["image_crc"][sample]:
                raise Undecodable(place, "its bytes have changed since the shard was indexed (checksum)")
            self.trusted_N[sample] = True
        return encoded_B

    def _decode(self, encoded, boxes_N4, orientations_N) -> torch.Tensor:
        return self._decoder.decode(encoded, boxes_N4, orientations_N)

    def _decode_some(self, inner_NHWC, places, encoded, boxes_N4, orientations_N) -> None:
        try:
            some = self._decode([encoded[place] for place in places], boxes_N4[places], orientations_N[places])
        except Undecodable as bad:
            raise Undecodable(int(places[bad.place]), bad.reason) from None
        inner_NHWC[torch.from_numpy(places)] = some.cpu()

    def _slice(self, inner_NHWC: np.ndarray, places, samples_N, encoded, boxes_N4) -> None:
        side, channels = self.shards.side, self.shards.channels
        for place in places.tolist():
            sample = samples_N[place]
            shape = tuple(int(self.columns[name][sample]) for name in ("height", "width", "channels"))
            image_HWC = encoded[place][-shape[0] * shape[1] * shape[2] :].reshape(shape)
            inner_NHWC[place] = cut_stored(image_HWC, boxes_N4[place], side, channels)

    def _bordered(self, inner_NHWC: torch.Tensor) -> torch.Tensor:
        pad = self.shards.pad
        return torch.nn.functional.pad(inner_NHWC, (0, 0, pad, pad, pad, pad)) if pad else inner_NHWC

    # text

    def _texts(self, samples_N: np.ndarray, choices_N: np.ndarray) -> tuple[list[str] | None, torch.Tensor | None]:
        captioned, attributed = self.columns["captions"].any(), self.attributes is not None
        if not captioned and not attributed:
            return None, None
        texts = [self._text(sample) for sample in samples_N.tolist()]
        captions = (
            [_chosen(text.captions, choice) for text, choice in zip(texts, choices_N.tolist())] if captioned else None
        )
        attributes_NK = torch.tensor([text.attributes for text in texts], dtype=torch.int8) if attributed else None
        return captions, attributes_NK

    def _text(self, sample: int) -> SampleText:
        try:
            return read_text(self._member("txt", sample), self._member("json", sample))
        except ValueError as reason:
            raise Refused(f"{self.where(sample)}: {reason}; write the shard again") from None

    def _member(self, extension: str, sample: int) -> bytes | None:
        size = int(self.columns[f"{extension}_size"][sample])
        if not size:
            return None
        start = int(self.columns[f"{extension}_offset"][sample])
        raw = self.bytes[self.shard_N[sample]][start : start + size].tobytes()
        if zlib.crc32(raw) != self.columns[f"{extension}_crc"][sample]:
            raise Refused(
                f"{self.where(sample)}: its .{extension} has changed since the shard was indexed; copy the shard again"
            )
        return raw


def _decoder(shards: Shards, device: torch.device):
    """The decoder the configuration asks for, and a note where another had to be taken."""
    if shards.decoder == "pillow":
        return PillowDecoder(shards.side, shards.channels, shards.threads), None
    reason = _why_no_dali()
    if reason is None:
        from duotone.data.dali import DaliDecoder

        return DaliDecoder(shards.side, shards.channels, shards.threads, device), None
    if shards.decoder == "dali":
        raise Refused(f"data.decoder is dali: {reason}; install nvidia-dali-cuda130, or use --data.decoder pillow")
    return PillowDecoder(shards.side, shards.channels, shards.threads), f"Pillow decodes the images: {reason}"


def _why_no_dali() -> str | None:
    if find_spec("nvidia") is None or find_spec("nvidia.dali") is None:
        return "nvidia.dali is not installed"
    return None


def _chosen(captions: list[str], choice: float) -> str:
    return captions[min(int(choice * len(captions)), len(captions) - 1)] if captions else ""


def _ignored(indexes: list[TarIndex]) -> str | None:
    totals: dict[str, int] = {}
    for index in indexes:
        for extension, count in index.ignored.items():
            totals[extension] = totals.get(extension, 0) + count
    listed = ", ".join(f"{count} .{extension}" for extension, count in sorted(totals.items()))
    return f"members that are not read: {listed}" if totals else None


def _fingerprint(indexes: list[TarIndex], manifest: Manifest) -> str:
    names = json.dumps([manifest.classes, manifest.attributes])
    return hashlib.sha256("\n".join([names, *[index.fingerprint for index in indexes]]).encode()).hexdigest()
