"""A folder of WebDataset shards: what to read and how, and all checks made before the first image is read."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from duotone.data.dataset import REMEDY, Dataset, OnBad
from duotone.data.framing import Frame
from duotone.data.held_out import Part, is_held_out, part_of
from duotone.data.manifest import NAME, read_manifest
from duotone.data.pillow import PillowDecoder
from duotone.data.refusal import Refused, at_least, share
from duotone.data.tar_index import KINDS, TarIndex, open_index

UNPACK = {".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.bz2": "bunzip2", ".tar.xz": "unxz", ".tar.zst": "unzstd"}


@dataclass(frozen=True, kw_only=True)
class Shards(Frame):
    """Where the training images are and how each becomes a square of pixels."""

    shards: Path | None = None
    """Folder of WebDataset shards (*.tar), made by `duotone prepare`, img2dataset or tar."""
    decoder: Literal["auto", "dali", "pillow"] = "auto"
    """What decodes JPEG, PNG and WebP; auto uses DALI if it is installed."""
    threads: int = 2
    """Threads that decode on the CPU."""
    on_bad: OnBad = "refuse"
    """If an image cannot be read: stop, or use the next sample and note it in the log and the run's record."""
    held_out: float = 0.0
    """Share of the images, chosen by key, that is never trained on; `duotone evaluate` measures against it too."""

    def __post_init__(self):
        if isinstance(self.shards, str):  # scripts may give a string
            object.__setattr__(self, "shards", Path(self.shards))
        super().__post_init__()
        at_least("data.threads", self.threads, 1)
        share("data.held_out", self.held_out, below_one=True)

    def open(self, device: torch.device, require_captions: bool = False, part: Part = "training") -> Dataset:
        """Checks every shard and indexes those without an index; raises Refused naming shard, key and remedy.

        The data set holds the samples of one part only: those to train on, those held out, or all.
        """
        paths = _shard_paths(self.shards)
        manifest = read_manifest(self.shards, paths)
        indexes = _open_indexes(paths)
        manifest.check(paths, indexes)
        indexes = _parted(indexes, self, part)
        dataset = Dataset(self, torch.device(device), paths, indexes, manifest, on_bad=self.on_bad)
        _check(dataset, self, require_captions)
        dataset.notes += [*_enlarged(dataset, self), *_transparent(dataset)]
        if not dataset.all_stored:
            dataset.decode_with(*_decoder(self, dataset.device))
        return dataset

    def held_out_keys(self) -> list[str]:
        """Keys of the samples that are never trained on, in the order of the shards."""
        keys = (key for index in _open_indexes(_shard_paths(self.shards)) for key in index.keys)
        return [key for key in keys if is_held_out(key, self.held_out)]


def _shard_paths(folder: Path | None) -> list[Path]:
    if folder is None:
        raise Refused("data.shards is not set: give a folder of .tar shards (make one with `duotone prepare`)")
    if folder.is_file():
        raise Refused(f"{folder}: it is a file; data.shards is the folder that holds the .tar shards")
    if not folder.is_dir():
        raise Refused(f"{folder}: there is no such folder; make shards with `duotone prepare`")
    paths = sorted(path for path in folder.glob("*.tar") if not path.name.startswith("."))
    _refuse_packed(folder, {path.name for path in paths})
    if not paths:
        raise Refused(f"{folder}: it holds no .tar shards; make some with `duotone prepare`")
    return paths


def _refuse_packed(folder: Path, plain: set[str]) -> None:
    """Raises Refused for a compressed shard without its plain .tar: its images would be missing silently."""
    for path in sorted(path for path in folder.glob("*") if not path.name.startswith(".")):
        ending = next((ending for ending in UNPACK if path.name.lower().endswith(ending)), None)
        if ending and f"{path.name[: -len(ending)]}.tar" not in plain:
            remedy = f"unpack it (`{UNPACK[ending]} {path}`), or move it away"
            raise Refused(f"{path}: it is packed, and shards are read as plain .tar; {remedy}")


def _open_indexes(paths: list[Path]) -> list[TarIndex]:
    progress = tqdm(paths, desc="indexing shards", unit="shard", leave=False, delay=1, disable=None)
    return [open_index(path) for path in progress]


def _parted(indexes: list[TarIndex], shards: Shards, part: Part) -> list[TarIndex]:
    kept = [part_of(index, shards.held_out, part) for index in indexes]
    before, after = (sum(len(index.keys) for index in some) for some in (indexes, kept))
    if before and not after:
        does = "leaves nothing to train on" if part == "training" else "holds out nothing"
        raise Refused(f"{shards.shards}: data.held_out {shards.held_out} {does} of {before:,} images; change the share")
    return kept


def _check(dataset: Dataset, shards: Shards, require_captions: bool) -> None:
    """Raises Refused for the first sample that training could not use."""
    if not dataset.count:
        raise Refused(f"{dataset.paths[0].parent}: it holds no images (jpg, jpeg, png, webp, npy); check the folder")
    if dataset.bad and shards.on_bad == "refuse":
        sample = min(dataset.bad)
        raise Refused(f"{dataset.where(sample)}: {dataset.bad[sample]}; {REMEDY}")
    if require_captions:
        _check_captions(dataset)
    _check_labels(dataset)
    _check_attributes(dataset)
    _check_sides(dataset, shards)


def _first(dataset: Dataset, failing_N: np.ndarray) -> int | None:
    failing_N = failing_N & dataset.good_N
    return int(failing_N.argmax()) if failing_N.any() else None


def _check_captions(dataset: Dataset) -> None:
    uncaptioned_N = dataset.columns["captions"] == 0
    sample = _first(dataset, uncaptioned_N)
    if sample is None:
        return
    remedy = "put a .txt beside every image, or train without text"
    if uncaptioned_N.all():
        raise Refused(f"{dataset.paths[0]}: it has no captions; {remedy}")
    raise Refused(f"{dataset.where(sample)}: the image has no caption; {remedy}")


def _check_labels(dataset: Dataset) -> None:
    labels_N, classes = dataset.columns["label"], dataset.classes
    sample = None if dataset.labels_N is None else _first(dataset, labels_N < 0)
    if sample is not None:
        raise Refused(f"{dataset.where(sample)}: it has no label but others do; label every sample or none")
    sample = None if classes is None else _first(dataset, labels_N >= len(classes))
    if sample is not None:
        label = labels_N[sample]
        raise Refused(
            f"{dataset.where(sample)}: label {label} is not below the {len(classes)} classes that {NAME} names"
        )


def _check_attributes(dataset: Dataset) -> None:
    found_N, named = dataset.columns["attributes"], len(dataset.attributes or [])
    sample = _first(dataset, found_N != named) if named else None
    if sample is not None:
        raise Refused(f"{dataset.where(sample)}: it has {found_N[sample]} attributes where {NAME} names {named}")


def _check_sides(dataset: Dataset, shards: Shards) -> None:
    side, heights_N, widths_N = shards.side, dataset.columns["height"], dataset.columns["width"]
    wrong_N = (heights_N != side) | (widths_N != side)
    sample = _first(dataset, wrong_N) if shards.resize == "none" else None
    if sample is not None:
        found = f"the image is {widths_N[sample]} x {heights_N[sample]}, not {side} x {side}"
        remedy = _remedy(shards, heights_N[sample], widths_N[sample])
        raise Refused(f"{dataset.where(sample)}: {found}; use {remedy}")


def _remedy(shards: Shards, height: int, width: int) -> str:
    """The flag to change: an image of exactly data.size leaves no room for the border that data.pad puts inside it."""
    return "--data.pad 0" if height == width == shards.size else "--data.resize crop, or another --data.size"


def _enlarged(dataset: Dataset, shards: Shards) -> list[str]:
    """A line if images are smaller than the square they become; only the shorter side matters, not the orientation."""
    shorter_N = np.minimum(dataset.columns["height"], dataset.columns["width"])
    count = int(((shorter_N < shards.side) & dataset.good_N).sum())
    wanted = f"data.size = {shards.size}" + (f" less data.pad = {shards.pad} on either side" if shards.pad else "")
    return [f"images smaller than {wanted}, which are enlarged: {count:,} of {dataset.count:,}"] if count else []


def _transparent(dataset: Dataset) -> list[str]:
    """A line if images have an alpha channel, which the decoders ignore."""
    kind_N, channels_N = dataset.columns["kind"], dataset.columns["channels"]
    alpha_N = np.isin(kind_N, [KINDS.index("png"), KINDS.index("webp")]) & np.isin(channels_N, (2, 4))
    count = int((alpha_N & dataset.good_N).sum())
    if not count:
        return []
    remedy = "`duotone prepare folder` lays pictures on white"
    return [f"images whose transparent parts show the colour beneath: {count:,} of {dataset.count:,}; {remedy}"]


def _decoder(shards: Shards, device: torch.device):
    """The decoder that the configuration asks for, and a note if another had to be used."""
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
