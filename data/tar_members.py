"""Walks a tar strictly: every byte must belong to a header, a member, its padding or the end mark; nothing is extracted.

Reads USTAR, GNU and PAX archives. Python's tarfile stops silently at a damaged header, and the rest of a shard would
be lost; here it is an error.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

BLOCK = 512
MAX_EXTENSION = 1 << 20  # bytes of a PAX or GNU long-name record
FILE_TYPES = {b"0", b"\0", b"7"}
PATH, LINK_NAME, PAX_TYPES, PAX_GLOBAL, FOLDER = b"L", b"K", {b"x", b"X"}, b"g", b"5"
REFUSED_TYPES = {b"1": "a hard link", b"2": "a symbolic link", b"3": "a device", b"4": "a device", b"6": "a pipe"}
REFUSED_TYPES |= {b"S": "a sparse file", b"M": "a part of another archive"}


class Damaged(ValueError):
    """Not a tar, or a tar that cannot be trusted; the message is the reason, without the file's name."""


@dataclass(frozen=True, slots=True)
class Member:
    """A regular file inside a tar: its bytes are data[offset : offset + size]."""

    name: str
    offset: int
    size: int


def members(data_B: np.ndarray) -> Iterator[Member]:
    """The regular files of a tar given as bytes (uint8), in order; raises Damaged."""
    data = memoryview(data_B)
    at, name, size = 0, None, None
    while True:
        header = bytes(data[at : at + BLOCK])
        if header == bytes(BLOCK):
            return _check_end(data_B, at)
        kind, own_name, own_size = _header(header, at)
        body = at + BLOCK
        if kind in FILE_TYPES and size is not None:
            own_size = size
        if body + own_size > len(data):
            raise Damaged(f"it is truncated: {own_name!r} runs past the end of the file")
        at = body + -(-own_size // BLOCK) * BLOCK
        if kind == PATH:
            name = _text(_extension(data, body, own_size).rstrip(b"\0"))
        elif kind in PAX_TYPES:
            pax = _pax(_extension(data, body, own_size))
            name, size = pax.get("path", name), _pax_size(pax)
        elif kind in FILE_TYPES:
            if not own_name.endswith("/"):  # pre-POSIX tars mark folders this way
                yield Member(name or own_name, body, own_size)
            name, size = None, None
        elif kind == FOLDER:
            name, size = None, None
        elif kind not in (LINK_NAME, PAX_GLOBAL):
            raise Damaged(f"{name or own_name!r} is {REFUSED_TYPES.get(kind, f'of unknown type {kind!r}')}, not a file")


def _check_end(data_B: np.ndarray, at: int) -> None:
    if len(data_B) - at < 2 * BLOCK:
        raise Damaged("it is truncated: the end mark is incomplete")
    if data_B[at:].any():
        raise Damaged(f"there is data after the end mark at byte {at} (tars joined with cat?)")


def _header(header: bytes, at: int) -> tuple[bytes, str, int]:
    if len(header) < BLOCK:
        raise Damaged("it is truncated: there is no end mark")
    if not _checksum_holds(header):
        if at == 0:
            raise Damaged("it is gzip-compressed" if header[:2] == b"\x1f\x8b" else "it is not a tar")
        raise Damaged(f"the header at byte {at} is damaged")
    kind = header[156:157]
    size = 0 if kind in REFUSED_TYPES and kind != b"S" else _number(header[124:136], at)
    return kind, _name(header), size


def _checksum_holds(header: bytes) -> bool:
    field = header[148:156].strip(b" \0")
    if not field or field.strip(b"01234567"):
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == int(field, 8)


def _number(field: bytes, at: int) -> int:
    if field[0] == 0x80:  # base 256, for sizes from 8 GiB
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if digits.strip(b"01234567"):
        raise Damaged(f"the header at byte {at} holds no valid size")
    return int(digits or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    return _text(name)


def _text(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Damaged(f"a member's name is not UTF-8: {raw[:80]!r}") from None


def _extension(data: memoryview, start: int, size: int) -> bytes:
    if size > MAX_EXTENSION:
        raise Damaged(f"a header extension of {size} bytes is larger than {MAX_EXTENSION}")
    return bytes(data[start : start + size])


def _pax(raw: bytes) -> dict[str, str]:
    """Path and size from records of the form b'<length> <key>=<value>\\n', where length counts the whole record."""
    records = {}
    while raw.strip(b"\0"):
        digits, blank, _ = raw[:20].partition(b" ")
        length = int(digits) if blank and digits.isdigit() else 0
        record = raw[len(digits) + 1 : length]
        if length > len(raw) or not record.endswith(b"\n") or b"=" not in record:
            raise Damaged("a PAX header is damaged")
        key, _, value = record[:-1].partition(b"=")
        if key.startswith(b"GNU.sparse"):
            raise Damaged("it holds a sparse file")
        if key in (b"path", b"size"):
            records[_text(key)] = _text(value)
        raw = raw[length:]
    return records


def _pax_size(pax: dict[str, str]) -> int | None:
    if "size" not in pax:
        return None
    if not (pax["size"].isascii() and pax["size"].isdigit() and len(pax["size"]) < 20):
        raise Damaged("a PAX header is damaged: its size is not a number")
    return int(pax["size"])
