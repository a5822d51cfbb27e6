"""The index of a tar shard: where each sample's bytes lie and what they are, built once and kept beside the shard.

The index of `00000.tar` is `00000.index.json`: columns with one number per sample. It is valid for a shard of one size
and modification time, and is rebuilt if they change. A CRC-32 per member lets readers trust the bytes they are given.
"""

import errno
import hashlib
import json
import os
import re
import resource
import zlib
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from duotone.data.image_header import MAX_BYTES, Unreadable, read_header
from duotone.data.refusal import Refused
from duotone.data.sample_text import read_text
from duotone.data.tar_members import Damaged, Member, members
from duotone.data.whole_file import write_whole

VERSION = 3
KINDS = ["jpeg", "png", "webp", "npy"]
ENCODED, DECODED = ("jpg", "jpeg", "png", "webp"), "npy"
IMAGE_COLUMNS = ["image_offset", "image_size", "image_crc"]
HEADER_COLUMNS = ["kind", "height", "width", "channels", "orientation"]
TEXT_COLUMNS = ["txt_offset", "txt_size", "txt_crc", "json_offset", "json_size", "json_crc", "captions"]
LABEL_COLUMNS = ["label", "attributes"]
COLUMNS = IMAGE_COLUMNS + HEADER_COLUMNS + TEXT_COLUMNS + LABEL_COLUMNS
WEBDATASET_NAME = re.compile(r"((?:.*/)?[^./][^./]*)\.([^/]*)")
SEAL = ',"sha256":"'
SPARE_FILES = 256  # open files to leave for all but the shards
UNSAFE_KEY = re.compile(r"[\x00-\x1f\x7f\\]|^/|(?:^|/)\.\.(?:/|$)")


@dataclass(frozen=True, kw_only=True)
class TarIndex:
    """One shard's samples, in tar order; `columns` holds int64 arrays (N,) named in COLUMNS."""

    keys: list[str]
    columns: dict[str, np.ndarray]
    bad: dict[int, str] = field(default_factory=dict)  # sample -> why its image or text cannot be used
    ignored: dict[str, int] = field(default_factory=dict)  # extension -> number of members that are not read
    fingerprint: str  # of every key, extension, size and checksum
    stamp: tuple[int, int]  # size and modification time (ns) of the shard that was read
    note: str | None = None  # for the user, if the index could not be kept


def index_path(shard: Path) -> Path:
    """Where a shard's index lies."""
    return shard.with_suffix(".index.json")


def open_index(shard: Path) -> TarIndex:
    """The shard's index, from the file beside it or built now; raises Refused if the shard is damaged or unusable."""
    stored = _load(index_path(shard), _stamp(shard))
    if stored is not None:
        return stored
    index = build_index(shard)
    try:
        save_index(shard, index)
    except OSError as error:
        note = f"{index_path(shard)} cannot be written ({error.strerror}): the shard is indexed again at every start"
        return replace(index, note=note)
    return index


def build_index(shard: Path) -> TarIndex:
    """Reads the whole shard once; raises Refused naming the shard, the key and the remedy."""
    stamp, data_B = _stamp(shard), map_bytes(shard)
    try:
        found = list(members(data_B))
    except Damaged as damage:
        raise Refused(f"{shard}: {damage}; write or download this shard again") from None
    samples, ignored = _grouped(shard, found)
    return _Table(shard, data_B).index(samples, ignored, stamp)


def map_bytes(shard: Path) -> np.ndarray:
    """The shard's bytes as read-only uint8 (B,), memory-mapped and not yet read; raises Refused."""
    try:
        return (
            np.memmap(shard, dtype=np.uint8, mode="r").view(np.ndarray)
            if shard.stat().st_size
            else np.empty(0, np.uint8)
        )
    except OSError as error:
        full = error.errno in (errno.EMFILE, errno.ENFILE)
        remedy = "raise `ulimit -n`, or pack fewer, larger shards" if full else "check its permissions"
        raise Refused(f"{shard}: it cannot be read ({error.strerror}); {remedy}") from None


def allow_open(shards: int) -> None:
    """Raises the soft limit of open files to the hard one if it is too low for so many mapped shards, one file each."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):  # if this fails, the first shard over the limit is refused, with a remedy
        if soft != resource.RLIM_INFINITY and len(os.listdir("/dev/fd")) + shards + SPARE_FILES > soft:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def save_index(shard: Path, index: TarIndex) -> None:
    """Writes the index beside its shard, whole or not at all."""
    content = {"version": VERSION, "stamp": index.stamp, "fingerprint": index.fingerprint, "ignored": index.ignored}
    content |= {"bad": {str(sample): reason for sample, reason in index.bad.items()}, "keys": index.keys}
    content |= {name: column.tolist() for name, column in index.columns.items()}
    write_whole(index_path(shard), _sealed(json.dumps(content, separators=(",", ":"), ensure_ascii=False)))


def _stamp(shard: Path) -> tuple[int, int]:
    if not shard.is_file():
        raise Refused(f"{shard}: it is not a file; a shard is a .tar file")
    stat = shard.stat()
    return stat.st_size, stat.st_mtime_ns


def _load(path: Path, stamp: tuple[int, int]) -> TarIndex | None:
    """The stored index if it belongs to exactly this shard, else None: it is a cache, rebuilt if in any doubt."""
    try:
        content = json.loads(_unsealed(path.read_text("utf-8")))
        if content["version"] != VERSION or content["stamp"] != list(stamp):
            return None
        index = _from_json(content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return index if _fits(index) else None


def _sealed(text: str) -> str:
    """A JSON object with one more field at the end: the hash of everything before it."""
    return f'{text[:-1]}{SEAL}{hashlib.sha256(text[:-1].encode()).hexdigest()}"}}'


def _unsealed(text: str) -> str:
    body, _, seal = text.rpartition(SEAL)
    if seal != f'{hashlib.sha256(body.encode()).hexdigest()}"}}':
        raise ValueError("the index is damaged")
    return body + "}"


def _from_json(content: dict) -> TarIndex:
    return TarIndex(
        keys=[str(key) for key in content["keys"]],
        columns={name: np.array(content[name], dtype=np.int64) for name in COLUMNS},
        bad={int(sample): str(reason) for sample, reason in content["bad"].items()},
        ignored={str(extension): int(count) for extension, count in content["ignored"].items()},
        fingerprint=str(content["fingerprint"]),
        stamp=tuple(content["stamp"]),
    )


def _fits(index: TarIndex) -> bool:
    shape, shard_bytes = (len(index.keys),), index.stamp[0]
    if any(column.shape != shape for column in index.columns.values()):
        return False
    ends = [(index.columns[f"{part}_offset"], index.columns[f"{part}_size"]) for part in ("image", "txt", "json")]
    return all((start >= 0).all() and (size >= 0).all() and (start + size <= shard_bytes).all() for start, size in ends)


def _grouped(shard: Path, found: list[Member]) -> tuple[dict[str, dict[str, Member]], Counter]:
    """Members by key, and counts of ignored extensions; as in webdataset, the key ends at the file name's first dot."""
    samples: dict[str, dict[str, Member]] = {}
    ignored: Counter = Counter()
    last = None
    for member in found:
        key, extension = _split(shard, member.name)
        if extension not in (*ENCODED, DECODED, "txt", "json"):
            ignored[extension] += 1
            continue
        if key in samples and key != last:
            raise Refused(
                f"{shard}: the members of key {key!r} are not next to each other; pack the shard again in order"
            )
        if extension in samples.setdefault(key, {}):
            raise Refused(f"{shard}: key {key!r} has two members .{extension}; give every sample its own key")
        samples[key][extension] = member
        last = key
    return samples, ignored


def _split(shard: Path, name: str) -> tuple[str, str]:
    name = name.removeprefix("./")
    if UNSAFE_KEY.search(name):
        raise Refused(f"{shard}: the member name {name[:80]!r} is unsafe; use plain relative names")
    match = WEBDATASET_NAME.fullmatch(name)
    return (match[1], match[2].lower()) if match else (name, "(hidden or without extension)")


class _Table:
    """Collects the columns in a single read of the shard."""

    def __init__(self, shard: Path, data_B: np.ndarray):
        self.shard = shard
        self.data = memoryview(data_B)
        self.digest = hashlib.sha256()
        self.bad: dict[int, str] = {}

    def index(self, samples: dict[str, dict[str, Member]], ignored: Counter, stamp: tuple[int, int]) -> TarIndex:
        rows = [self._row(number, key, parts, ignored) for number, (key, parts) in enumerate(samples.items())]
        table = np.array(rows, dtype=np.int64).reshape(len(rows), len(COLUMNS))
        return TarIndex(
            keys=list(samples),
            columns={name: np.ascontiguousarray(table[:, place]) for place, name in enumerate(COLUMNS)},
            bad=self.bad,
            ignored=dict(ignored),
            fingerprint=self.digest.hexdigest(),
            stamp=stamp,
        )

    def _row(self, number: int, key: str, parts: dict[str, Member], ignored: Counter) -> list[int]:
        encoded = [extension for extension in parts if extension in ENCODED]
        if len(encoded) > 1:
            raise Refused(f"{self.shard}: key {key!r} has {len(encoded)} images; give every image its own key")
        if not encoded and DECODED not in parts:
            raise Refused(f"{self.shard}: key {key!r} has text but no image; add the image or drop the text")
        if encoded and parts.pop(DECODED, None):  # such as an embedding beside the picture
            ignored[DECODED] += 1
        image = parts[(encoded or [DECODED])[0]]
        image_bytes = self._bytes(image) if image.size <= MAX_BYTES else b""
        text_bytes = {extension: self._bytes(parts[extension]) for extension in ("txt", "json") if extension in parts}
        places = [*self._place(key, image, image_bytes), *self._header(number, image, image_bytes)]
        for extension in ("txt", "json"):
            places += self._place(key, parts.get(extension), text_bytes.get(extension, b""))
        return places + self._text(number, text_bytes)

    def _bytes(self, member: Member) -> bytes:
        return bytes(self.data[member.offset : member.offset + member.size])

    def _place(self, key: str, member: Member | None, raw: bytes) -> list[int]:
        if member is None:
            return [0, 0, 0]
        crc = zlib.crc32(raw)
        self.digest.update(f"{key}\t{member.name.rpartition('.')[2].lower()}\t{member.size}\t{crc}\n".encode())
        return [member.offset, member.size, crc]

    def _header(self, number: int, member: Member, raw: bytes) -> list[int]:
        try:
            if member.size > MAX_BYTES:
                raise Unreadable(f"its {member.size} bytes exceed {MAX_BYTES}")
            header = read_header(raw)
            if (header.kind == "npy") != member.name.lower().endswith(".npy"):
                raise Unreadable(f"its content is {header.kind}, not what its name says")
        except Unreadable as reason:
            self.bad[number] = str(reason)
            return [0, 0, 0, 0, 1]
        return [KINDS.index(header.kind), header.height, header.width, header.channels, header.orientation]

    def _text(self, number: int, raw: dict[str, bytes]) -> list[int]:
        try:
            text = read_text(raw.get)
        except ValueError as reason:
            self.bad.setdefault(number, str(reason))
            return [0, -1, 0]
        return [len(text.captions), text.label, len(text.attributes or [])]
