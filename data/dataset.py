"""Open shards: samples by number, their bytes guarded before any decoder sees them, batches read ahead of time."""

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from duotone.data.ahead import Ahead
from duotone.data.batch import Batch, Plan
from duotone.data.framing import boxes
from duotone.data.manifest import Manifest
from duotone.data.pillow import Undecodable, cut_stored
from duotone.data.refusal import Refused
from duotone.data.sample_text import SampleText, read_text
from duotone.data.tar_index import COLUMNS, KINDS, TarIndex, map_bytes

if TYPE_CHECKING:
    from duotone.data.shards import Shards

STORED = KINDS.index("npy")
REMEDY = "write or download it again, or pass --data.on-bad replace to read the next sample instead"


class Dataset:
    """Open shards: `count` samples by number, read as plans say."""

    def __init__(
        self, shards: "Shards", device: torch.device, paths: list[Path], indexes: list[TarIndex], manifest: Manifest
    ):
        self.shards, self.device, self.paths = shards, device, paths
        self.classes, self.attributes = manifest.classes, manifest.attributes
        counts = [len(index.keys) for index in indexes]
        self.count = sum(counts)
        self.keys = [key for index in indexes for key in index.keys]
        self.shard_N = np.repeat(np.arange(len(paths)), counts)
        self.columns = {name: np.concatenate([index.columns[name] for index in indexes]) for name in COLUMNS}
        self.fingerprint = _fingerprint(indexes, manifest)
        self.bad = _bad(indexes, np.cumsum([0, *counts]))
        self.notes = [note for note in [manifest.note, *[index.note for index in indexes], _ignored(indexes)] if note]
        self.bytes = [map_bytes(path) for path in paths]
        self.trusted_N = np.zeros(self.count, dtype=bool)
        self._decoder, self.decoder_note = None, None

    # what is known without reading an image

    @cached_property
    def has_captions(self) -> bool:
        """Whether every sample that can be read has at least one caption."""
        return bool((self.columns["captions"] > 0)[self.good_N].all())

    @property
    def good_N(self) -> np.ndarray:
        """Which samples can be read, as far as is known: bool (count,)."""
        good_N = np.ones(self.count, dtype=bool)
        good_N[list(self.bad)] = False
        return good_N

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

    def decode_with(self, decoder, note: str | None) -> None:
        """Takes the decoder of encoded images, and what is to be said about that choice."""
        self._decoder, self.decoder_note = decoder, note

    def where(self, sample: int) -> str:
        """A sample's shard and key, for messages."""
        return f"{self.paths[self.shard_N[sample]]}: key {self.keys[sample]!r}"

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

    # one batch

    def _readable(self, planned_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The planned samples, each bad one replaced by the next good one, and what was replaced."""
        if not self.bad:
            return planned_N, []
        if len(self.bad) >= self.count:
            raise Refused(f"{self.paths[0].parent}: not one image can be read; the first: {self.bad[min(self.bad)]}")
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


def _bad(indexes: list[TarIndex], starts: np.ndarray) -> dict[int, str]:
    """Samples that cannot be read, numbered through all shards, and why."""
    found = {}
    for start, index in zip(starts.tolist(), indexes):
        found |= {start + sample: reason for sample, reason in index.bad.items()}
    return found


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
