"""Samples -> WebDataset shards with their indexes and dataset.json: all of them, or nothing."""

import errno
import io
import json
import os
import secrets
import shutil
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from duotone.data.image_header import Unreadable
from duotone.data.manifest import NAME, Manifest
from duotone.data.refusal import Refused
from duotone.data.sample_text import MAX_BYTES, read_text
from duotone.data.tar_index import TarIndex, build_index, save_index

ImageFormat = Literal["jpg", "png", "npy"]


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One image with its captions, label and attributes."""

    image: np.ndarray | bytes  # uint8 (H, W, C) with C 1 or 3; or encoded bytes, stored as they are
    extension: str | None = None  # of encoded bytes: jpg, png or webp
    key: str | None = None  # None: the sample's number
    captions: list[str] = field(default_factory=list)
    label: int | None = None
    attributes: list[int] | None = None  # each 1 present, 0 absent, -1 unknown
    source: str | None = None  # where it came from, for messages


def write_shards(
    samples: Iterable[Sample],
    out: Path,
    *,
    classes: list[str] | None = None,
    attributes: list[str] | None = None,
    per_shard: int = 4096,
    image_format: ImageFormat = "jpg",
    quality: int = 95,
    about: dict | None = None,
) -> dict:
    """Writes a folder of shards and returns dataset.json's content, which includes `about`.

    Raises Refused if `out` exists, there are no samples, or training could not read one of them.
    """
    if os.path.lexists(out):
        raise Refused(f"{out}: it exists already; choose another --out, or remove it")
    with whole_folder(out) as folder:
        count, shards = 0, {}
        for number, chunk in enumerate(_chunks(samples, per_shard)):
            shard = folder / f"{number:05d}.tar"
            names = _write_shard(shard, chunk, count, image_format, quality)
            index = build_index(shard)
            _refuse_bad(index, names)
            save_index(shard, index)
            shards[shard.name] = index.fingerprint
            count += len(index.keys)
        if not count:
            raise Refused(f"{out}: there are no images to write; check the input")
        path, about = folder / NAME, about or {}
        manifest = Manifest(path=path, count=count, classes=classes, attributes=attributes, shards=shards, about=about)
        manifest.save()
    return manifest.content()


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out`, renamed to `out` if the block succeeds and removed if it fails; raises Refused."""
    out = Path(os.path.abspath(out))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.with_name(f".{out.name}.partial-{secrets.token_hex(4)}")
        folder.mkdir()
    except OSError as error:
        raise Refused(f"{out}: its parent folder cannot be written ({error.strerror}); choose another --out") from None
    try:
        with _when_stopped(_leave):
            yield folder
            folder.rename(out)
    except BaseException as error:
        with _when_stopped(signal.SIG_IGN):  # a second signal would leave half the folder behind
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise _failed(out, error) from None
        raise


def _failed(out: Path, error: OSError) -> Refused:
    if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
        return Refused(f"{out}: another process has written it meanwhile; use what it wrote, or choose another --out")
    return Refused(f"{out}: writing failed ({error.strerror}); make room, or choose another --out")


@contextmanager
def _when_stopped(handler) -> Iterator[None]:
    """Handles SIGTERM and SIGHUP, which would end the process at once, unless they are handled or ignored already."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return
    signals = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    try:
        for one in signals:
            signal.signal(one, handler)
        yield
    finally:
        for one in signals:
            signal.signal(one, signal.SIG_DFL)


def _leave(number: int, frame) -> None:
    raise SystemExit(128 + number)  # as in a shell


def encode_image(image_HWC: np.ndarray, image_format: ImageFormat, quality: int) -> bytes:
    """uint8 (H, W, C) as JPEG, PNG or .npy bytes; JPEG keeps full colour resolution from quality 90."""
    stream = io.BytesIO()
    if image_format == "npy":
        np.lib.format.write_array(stream, np.ascontiguousarray(image_HWC), version=(1, 0), allow_pickle=False)
        return stream.getvalue()
    picture = Image.fromarray(image_HWC[:, :, 0] if image_HWC.shape[2] == 1 else image_HWC)
    if image_format == "png":
        picture.save(stream, "PNG")
    else:
        picture.save(stream, "JPEG", quality=quality, subsampling=0 if quality >= 90 else 2)
    return stream.getvalue()


def _chunks(samples: Iterable[Sample], per_shard: int) -> Iterator[Iterator[Sample]]:
    samples = iter(samples)
    for first in samples:
        yield chain([first], islice(samples, per_shard - 1))


def _write_shard(
    shard: Path, samples: Iterator[Sample], first: int, image_format: ImageFormat, quality: int
) -> list[str]:
    """Writes one shard and returns the name by which messages call each sample."""
    from webdataset import TarWriter  # imported here, because it takes a second and readers do not need it

    names = []
    with shard.open("wb") as stream:
        with TarWriter(stream, encoder=False, mtime=0, format="PAX_FORMAT") as tar:
            for number, sample in enumerate(samples, start=first):
                key = sample.key or f"{number:09d}"
                names.append(sample.source or key)
                tar.write(_members(sample, key, image_format, quality))
        stream.flush()
        os.fsync(stream.fileno())
    return names


def _refuse_bad(index: TarIndex, names: list[str]) -> None:
    """Raises Refused for the first sample that training would refuse, by the name that the user knows it by."""
    if index.bad:
        sample = min(index.bad)
        raise Refused(f"{names[sample]}: {index.bad[sample]}; make it smaller or repair it, or leave it out")


def _members(sample: Sample, key: str, image_format: ImageFormat, quality: int) -> dict:
    members = {"__key__": key}
    if isinstance(sample.image, bytes):
        members[sample.extension] = sample.image
    else:
        members[image_format] = encode_image(sample.image, image_format, quality)
    try:
        return members | readable_texts(sample)
    except Unreadable as reason:
        raise Refused(f"{sample.source or key}: {reason}; correct it") from None


def readable_texts(sample: Sample) -> dict[str, bytes]:
    """A sample's captions, label and attributes as .txt and .json; raises Unreadable if training cannot read them."""
    try:
        texts = _texts(sample)
        if len(texts.get("json", b"")) > MAX_BYTES:
            raise Unreadable(f"its captions are too long: {len(texts['json'])} bytes in all exceed {MAX_BYTES}")
        read_text(texts.get)
    except UnicodeEncodeError:
        raise Unreadable("a caption holds half a surrogate pair") from None
    except ValueError as reason:
        raise Unreadable(str(reason)) from None
    return texts


def _texts(sample: Sample) -> dict[str, bytes]:
    said = {"captions": sample.captions or None, "label": sample.label, "attributes": sample.attributes}
    said = {name: value for name, value in (said | {"source": sample.source}).items() if value is not None}
    txt = {"txt": sample.captions[0].encode()} if sample.captions else {}
    return txt | ({"json": json.dumps(said, ensure_ascii=False).encode()} if said else {})
