"""Reads an image's dimensions before any decoder sees it: JPEG, PNG, WebP, and .npy (uint8, HWC)."""

import re
import struct
from dataclasses import dataclass

EXIF = b"Exif\0\0"
TIFF_NUMBERS = {3: "H", 4: "I"}  # the standard has orientation as H; some cameras write I
MAX_BYTES = 1 << 26  # of one encoded image: 64 MiB
MAX_PIXELS = 1 << 26  # height x width: 8192 x 8192
PNG_CHANNELS = {0: 1, 2: 3, 3: 3, 4: 2, 6: 4}
NPY_MAX_HEADER = 512
NPY_HEADER = re.compile(
    rb"\{'descr': '\|u1', 'fortran_order': False, 'shape': \((\d{1,8}), (\d{1,8})(?:, (\d{1,8}))?\), \}\s*"
)
JPEG_FRAMES = {0xC0, 0xC1, 0xC2}  # baseline, extended, progressive
JPEG_OTHER_FRAMES = set(range(0xC3, 0xD0)) - {0xC4, 0xC8, 0xCC}


class Unreadable(ValueError):
    """An image that is not passed to any decoder; the message is the reason."""


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """What the header says; height and width are as stored, before `orientation` (EXIF, 1 to 8) is applied."""

    kind: str  # "jpeg", "png", "webp" or "npy"
    height: int
    width: int
    channels: int  # as stored; PNG and WebP with transparency have 2 or 4
    orientation: int = 1


def read_header(data: bytes) -> ImageHeader:
    """The header of an encoded image; raises Unreadable if it is of another format, truncated or oversized."""
    if not 16 <= len(data) <= MAX_BYTES:
        raise Unreadable("it is truncated" if len(data) < 16 else f"its {len(data)} bytes exceed {MAX_BYTES}")
    try:
        header = _reader(data)(data)
    except (IndexError, struct.error):
        raise Unreadable("its header is truncated") from None
    if header.height < 1 or header.width < 1:
        raise Unreadable("its header says it has no pixels")
    if header.height * header.width > MAX_PIXELS:
        raise Unreadable(f"{header.width} x {header.height} pixels exceed {MAX_PIXELS}")
    return header


def _reader(data: bytes):
    if data[:3] == b"\xff\xd8\xff":
        return _jpeg
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _png
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return _webp
    if data[:6] == b"\x93NUMPY":
        return _npy
    raise Unreadable("it is neither JPEG, PNG, WebP nor .npy")


def _jpeg(data: bytes) -> ImageHeader:
    at, frame, orientation = 2, None, None
    while True:
        while data[at] == 0xFF and data[at + 1] == 0xFF:
            at += 1
        if data[at] != 0xFF:
            raise Unreadable("its JPEG markers are damaged")
        marker, at = data[at + 1], at + 2
        if marker == 0x01 or 0xD0 <= marker <= 0xD7:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if marker in JPEG_FRAMES:
            frame = struct.unpack_from(">BHHB", data, at + 2)
        elif marker in JPEG_OTHER_FRAMES:
            raise Unreadable("its JPEG process is not supported (lossless or arithmetic)")
        elif marker == 0xE1 and data[at + 2 : at + 8] == EXIF and orientation is None:  # XMP uses this marker too
            orientation = _orientation(data[at + 8 : at + length])
        elif marker == 0xD9 or length < 2:
            raise Unreadable("its JPEG markers are damaged")
        elif marker == 0xDA:
            break
        at += length
    if frame is None:
        raise Unreadable("its JPEG frame header is missing")
    bits, height, width, channels = frame
    if bits != 8 or channels not in (1, 3, 4):
        raise Unreadable(f"a JPEG of {channels} components of {bits} bits is not supported")
    if data.find(b"\xff\xd9", at) < 0:
        raise Unreadable("it is truncated: the JPEG end mark is missing")
    return ImageHeader("jpeg", height, width, channels, orientation or 1)


def _orientation(tiff: bytes) -> int:
    """Orientation from an EXIF block; 1 (upright) if it is absent or damaged."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, start)
        for entry in range(entries):
            at = start + 2 + 12 * entry
            tag, kind = struct.unpack_from(order + "HH", tiff, at)
            if tag == 0x0112 and kind in TIFF_NUMBERS:
                (value,) = struct.unpack_from(order + TIFF_NUMBERS[kind], tiff, at + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        pass
    return 1


def _png(data: bytes) -> ImageHeader:
    length, name, width, height, bits, colour = struct.unpack_from(">I4sIIBB", data, 8)
    if name != b"IHDR" or length != 13 or colour not in PNG_CHANNELS:
        raise Unreadable("its PNG header is damaged")
    if bits == 16:
        raise Unreadable("it is a PNG of 16 bits per channel; 8 are supported")
    if b"IEND" not in data[-64:] and b"IEND" not in data:
        raise Unreadable("it is truncated: the PNG end chunk is missing")
    exif = _png_chunk(data, b"eXIf")
    channels = 4 if colour == 3 and _png_chunk(data, b"tRNS") else PNG_CHANNELS[colour]
    return ImageHeader("png", height, width, channels, _orientation(exif.removeprefix(EXIF)))


def _png_chunk(data: bytes, wanted: bytes) -> bytes:
    """The content of the first chunk of this name, empty if there is none."""
    at = 8
    while at + 8 <= len(data):
        length, name = struct.unpack_from(">I4s", data, at)
        if name == wanted:
            return data[at + 8 : at + 8 + length]
        at += 12 + length
    return b""


def _webp(data: bytes) -> ImageHeader:
    (riff_size,) = struct.unpack_from("<I", data, 4)
    if riff_size + 8 > len(data):
        raise Unreadable("it is truncated: fewer bytes than its WebP header says")
    chunk, alpha = data[12:16], False
    if chunk == b"VP8X":
        if data[20] & 2:
            raise Unreadable("it is an animated WebP")
        width = int.from_bytes(data[24:27], "little") + 1
        height = int.from_bytes(data[27:30], "little") + 1
        alpha = bool(data[20] & 16)
    elif chunk == b"VP8L" and data[20] == 0x2F:
        word = int.from_bytes(data[21:25], "little")
        width, height = (word & 0x3FFF) + 1, (word >> 14 & 0x3FFF) + 1
        alpha = bool(word >> 28 & 1)
    elif chunk == b"VP8 " and data[23:26] == b"\x9d\x01\x2a":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise Unreadable("its WebP header is damaged")
    exif = _webp_chunk(data, b"EXIF") if chunk == b"VP8X" else b""
    return ImageHeader("webp", height, width, 4 if alpha else 3, _orientation(exif.removeprefix(EXIF)))


def _webp_chunk(data: bytes, wanted: bytes) -> bytes:
    """The same for a WebP file, whose chunks start at even offsets."""
    at = 12
    while at + 8 <= len(data):
        name, length = struct.unpack_from("<4sI", data, at)
        if name == wanted:
            return data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
    return b""


def _npy(data: bytes) -> ImageHeader:
    """Height, width and channels of a .npy array; its pixels are the last height * width * channels bytes."""
    (length,) = struct.unpack_from("<H", data, 8)
    if data[6:8] != b"\x01\x00" or length > NPY_MAX_HEADER:
        raise Unreadable("its .npy header is damaged or not of version 1.0")
    match = NPY_HEADER.fullmatch(data[10 : 10 + length])
    if match is None:
        raise Unreadable("a .npy image must be uint8 in C order, of shape (height, width, channels)")
    height, width, channels = (int(side or 1) for side in match.groups())
    if channels not in (1, 3):
        raise Unreadable("a .npy image must have 1 or 3 channels")
    if len(data) != 10 + length + height * width * channels:
        raise Unreadable("it is truncated: fewer bytes than its .npy header says")
    return ImageHeader("npy", height, width, channels)
