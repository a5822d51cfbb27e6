"""Open shards: samples by number, and batches read ahead of time."""

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from duotone.data.ahead import Ahead
from duotone.data.batch import Batch, Plan, to_device
from duotone.data.framing import Frame
from duotone.data.guarded import BadSample, GuardedBytes
from duotone.data.manifest import Manifest
from duotone.data.refusal import Refused, SampleReplaced
from duotone.data.sample_text import SampleText
from duotone.data.squares import STORED, Squares
from duotone.data.tar_index import COLUMNS, TarIndex

OnBad = Literal["refuse", "replace"]
REMEDY = "write or download it again, or pass --data.on-bad replace to read the next sample instead"


class Dataset:
    """`count` numbered samples, read as plans ask.

    `fingerprint` changes when the data does; `notes` are lines for the user; `decoder_note` says which decoder was
    substituted for the preferred one, and why.
    """

    def __init__(
        self,
        frame: Frame,
        device: torch.device,
        paths: list[Path],
        indexes: list[TarIndex],
        manifest: Manifest,
        *,
        on_bad: OnBad,
    ):
        counts = [len(index.keys) for index in indexes]
        self.on_bad, self.device, self.paths, self.count = on_bad, device, paths, sum(counts)
        self.classes, self.attributes = manifest.classes, manifest.attributes
        self.keys = [key for index in indexes for key in index.keys]
        self.shard_N = np.repeat(np.arange(len(paths)), counts)
        self.columns = {name: np.concatenate([index.columns[name] for index in indexes]) for name in COLUMNS}
        self.bad = _bad(indexes, np.cumsum([0, *counts]))
        self.fingerprint = _fingerprint(indexes, manifest)
        self.notes = [note for note in [manifest.note, *[index.note for index in indexes], _ignored(indexes)] if note]
        if self.bad:
            more = f" and {len(self.bad) - 1} more" if len(self.bad) > 1 else ""
            self.notes.append(f"the next sample is read instead of {self.unread()[0]}{more}")
        self.decoder_note: str | None = None
        self._bytes = GuardedBytes(paths, self.shard_N, self.columns)
        self._squares = Squares(frame, self.columns, decoder=None)

    def decode_with(self, decoder, note: str | None) -> None:
        """Sets the decoder of encoded images, and a note to the user about that choice."""
        self._squares.decoder, self.decoder_note = decoder, note

    @property
    def decoder(self) -> str:
        """The decoder in use: "dali", "pillow", or "stored" if every image is stored decoded."""
        return self._squares.decoder.name if self._squares.decoder else "stored"

    @property
    def all_stored(self) -> bool:
        """Whether every image is stored decoded."""
        return bool((self.columns["kind"] == STORED).all())

    @property
    def good_N(self) -> np.ndarray:
        """Which samples can be read, as far as known: bool (count,)."""
        good_N = np.ones(self.count, dtype=bool)
        good_N[list(self.bad)] = False
        return good_N

    @cached_property
    def has_captions(self) -> bool:
        """Whether every sample that can be read has at least one caption."""
        return bool((self.columns["captions"] > 0)[self.good_N].all())

    @cached_property
    def labels_N(self) -> np.ndarray | None:
        """Class of every sample, int64 (count,), or None if the shards hold no labels."""
        return self.columns["label"] if self.count and self.columns["label"].max() >= 0 else None

    def captions_at(self, sample: int) -> list[str]:
        """All captions of a sample; raises Refused if they cannot be read."""
        try:
            return self._bytes.text(sample).captions
        except BadSample as bad:
            raise Refused(f"{self.where(sample)}: {bad.reason}; {REMEDY}") from None

    def where(self, sample: int) -> str:
        """A sample's shard and key, for messages."""
        return f"{self.paths[self.shard_N[sample]]}: key {self.keys[sample]!r}"

    def batches(self, plans: Iterable[Plan], ahead: int = 2) -> Iterator[Batch]:
        """Batches in the order of their plans; a thread iterates `plans` and reads `ahead` batches in advance."""
        return Ahead(map(self.read, plans), ahead)

    def read(self, plan: Plan) -> Batch:
        """One batch; raises Refused for a sample that cannot be read, unless on_bad is "replace"."""
        while True:
            samples_N, skipped = self._readable(plan.samples_N)
            try:
                return self._batch(plan, samples_N, skipped)
            except BadSample as bad:
                if self.on_bad == "refuse":
                    raise Refused(f"{self.where(bad.sample)}: {bad.reason}; {REMEDY}") from None
                self.bad[bad.sample] = bad.reason
                told = f"{self.where(bad.sample)}: {bad.reason}; the next sample is read instead"
                warnings.warn(told, SampleReplaced, stacklevel=2)

    def unread(self) -> list[str]:
        """The samples that cannot be read, as far as known: a line for each, with its reason."""
        return [f"{self.where(sample)}: {reason}" for sample, reason in sorted(self.bad.items())]

    def close(self) -> None:
        """Ends the decoder's threads and releases the shards."""
        if self._squares.decoder:
            self._squares.decoder.close()
        self._bytes.close()

    def _readable(self, planned_N: np.ndarray) -> tuple[np.ndarray, list[str]]:
        """The planned samples with each bad one replaced by the next good one, and a line per replaced sample."""
        if not self.bad:
            return planned_N, []
        if len(self.bad) >= self.count:
            raise Refused(f"{self.paths[0].parent}: no image can be read; the first: {self.bad[min(self.bad)]}")
        replaced = [(place, int(sample)) for place, sample in enumerate(planned_N) if int(sample) in self.bad]
        samples_N = planned_N.copy()
        for place, sample in replaced:
            samples_N[place] = self._next_good(sample)
        return samples_N, [f"{self.keys[sample]}: {self.bad[sample]}" for _, sample in replaced]

    def _next_good(self, sample: int) -> int:
        while sample in self.bad:
            sample = (sample + 1) % self.count
        return sample

    def _batch(self, plan: Plan, samples_N: np.ndarray, skipped: list[str]) -> Batch:
        samples = samples_N.tolist()
        encoded = [self._bytes.image(sample) for sample in samples]
        images_NHWC = self._squares.images(samples_N, encoded, plan.crops_N2)
        texts = [self._bytes.text(sample) for sample in samples] if self._captioned or self.attributes else []
        return Batch(
            positions_N=plan.positions_N,
            keys=[self.keys[sample] for sample in samples],
            images_NHWC=to_device(images_NHWC, self.device),
            captions=_chosen(texts, plan.captions_N) if self._captioned else None,
            labels_N=None if self.labels_N is None else torch.from_numpy(self.labels_N[samples_N]),
            attributes_NK=_attributes(texts) if self.attributes else None,
            skipped=skipped,
        )

    @cached_property
    def _captioned(self) -> bool:
        return bool(self.columns["captions"].any())


def _chosen(texts: list[SampleText], choices_N: np.ndarray) -> list[str]:
    """One caption per sample, "" if it has none."""
    listed = [text.captions or [""] for text in texts]
    return [captions[min(int(u * len(captions)), len(captions) - 1)] for captions, u in zip(listed, choices_N.tolist())]


def _attributes(texts: list[SampleText]) -> torch.Tensor:
    return torch.from_numpy(np.array([text.attributes for text in texts], dtype=np.int8))


def _bad(indexes: list[TarIndex], starts: np.ndarray) -> dict[int, str]:
    """Samples that cannot be read, numbered across all shards, and why."""
    found = {}
    for start, index in zip(starts.tolist(), indexes):
        found |= {start + sample: reason for sample, reason in index.bad.items()}
    return found


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
