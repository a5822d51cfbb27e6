"""Image headers against Pillow, and images that must never reach a decoder."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from duotone.data.image_header import MAX_PIXELS, Unreadable, read_header

REAL = [
    ("JPEG", "RGB", {}),
    ("JPEG", "RGB", {"progressive": True, "subsampling": 0}),
    ("JPEG", "L", {}),
    ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"optimize": True, "comment": b"x" * 60000}),
    ("PNG", "RGB", {}),
    ("PNG", "RGBA", {}),
    ("PNG", "L", {}),
    ("PNG", "LA", {}),
    ("PNG", "P", {}),
    ("PNG", "1", {}),
    ("WEBP", "RGB", {}),
    ("WEBP", "RGBA", {}),
    ("WEBP", "RGB", {"lossless": True}),
    ("WEBP", "RGBA", {"lossless": True}),
    ("WEBP", "RGB", {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0"}),
]


@pytest.mark.parametrize("format, mode, options", REAL)
def test_agrees_with_pillow(photos, encode, format, mode, options):
    for height, width in ((427, 640), (1, 1), (37, 300)):
        raw = encode(photos[0][:height, :width], format, mode, **options)
        header = read_header(raw)
        assert (header.kind, header.height, header.width) == (format.lower(), height, width)
        with Image.open(io.BytesIO(raw)) as image:
            assert header.channels == (3 if image.mode == "P" else len(image.getbands()))


def test_a_png_may_end_long_before_its_file_does(photos, encode):
    """Some tools append data of their own."""
    raw = encode(photos[0][:40, :60], "PNG")
    assert read_header(raw + bytes(100)) == read_header(raw)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(photos, encode, orientation):
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "described", orientation
    assert read_header(encode(photos[0], exif=exif)).orientation == orientation


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(
    "options", [{}, {"xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>" + bytes(301)}], ids=["alone", "and xmp"]
)
def test_orientation_is_pillows_in_every_format(photos, encode, format, options):
    """Photo editors write XMP beside EXIF, in JPEG under the same marker."""
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "odd", 6
    raw = encode(photos[0][:40, :60], format, exif=exif, **(options if format != "PNG" else {}))
    with Image.open(io.BytesIO(raw)) as image:
        assert image.getexif()[0x0112] == 6
    assert read_header(raw).orientation == 6


def test_orientation_wherever_cameras_and_editors_write_it(photos, encode):
    """As a long integer, after a needless prefix in PNG, and in two JPEG blocks; the first counts, as in Pillow."""
    tiff = {kind: struct.pack(">4sIHHHI", b"MM\0*", 8, 1, 0x0112, kind, 1) for kind in (3, 4)}
    long, short = tiff[4] + struct.pack(">I", 6), tiff[3] + struct.pack(">HH", 6, 0)
    upright = tiff[3] + struct.pack(">HH", 1, 0)
    for block in (long, short):
        assert read_header(encode(photos[0][:40, :60], exif=b"Exif\0\0" + block)).orientation == 6
    png = encode(photos[0][:40, :60], "PNG")
    body = b"eXIf" + b"Exif\0\0" + short
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    assert read_header(png[:33] + chunk + png[33:]).orientation == 6
    jpeg = encode(photos[0][:40, :60])
    segments = b"".join(
        b"\xff\xe1" + struct.pack(">H", 8 + len(block)) + b"Exif\0\0" + block for block in (upright, short)
    )
    assert read_header(jpeg[:2] + segments + jpeg[2:]).orientation == 1


def test_npy(photos, encode):
    header = read_header(encode(photos[0], "npy"))
    assert (header.kind, header.height, header.width, header.channels) == ("npy", 427, 640, 3)
    gray = read_header(encode(photos[0][:, :, 0], "npy"))
    assert (gray.height, gray.width, gray.channels) == (427, 640, 1)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "npy"])
def test_every_truncation_is_seen(photos, encode, format):
    raw = encode(photos[1][:40, :40], format)
    for length in range(len(raw) - (12 if format == "PNG" else 0)):
        with pytest.raises(Unreadable):
            read_header(raw[:length])


def png(width, height):
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    chunks = [(b"IHDR", header), (b"IDAT", pixels), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(raw)) + name + raw + struct.pack(">I", zlib.crc32(name + raw)) for name, raw in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def test_bombs():
    with pytest.raises(Unreadable, match="pixels exceed"):
        read_header(png(15_000, 15_000))
    with pytest.raises(Unreadable, match="pixels exceed"):
        read_header(png(1, MAX_PIXELS + 1))
    with pytest.raises(Unreadable, match="no pixels"):
        read_header(png(0, 10))


def test_jpeg_with_dimensions_that_lie(photos, encode):
    raw = bytearray(encode(photos[0][:16, :16]))
    frame = raw.index(b"\xff\xc0")
    raw[frame + 5 : frame + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(Unreadable, match="pixels exceed"):
        read_header(bytes(raw))


def npy(header):
    header = header.encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(12)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '|O', 'fortran_order': False, 'shape': (2, 2, 3)}",
        "{'descr': '|u1', 'fortran_order': True, 'shape': (2, 2, 3)}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 1, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, -2, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2, 2, 4)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (2.0, 2, 3)}",
        "{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 3)}",
        "{'descr': [('a', '|u1')], 'fortran_order': False, 'shape': (12,)}",
        "__import__('os').system('true')",
        "{'descr': '|u1'",
        "(" * 400,
        "[]",
    ],
)
def test_hostile_npy(header):
    with pytest.raises(Unreadable):
        read_header(npy(header))


def test_other_formats(photos, encode):
    for raw in (
        encode(photos[0], "GIF", "P"),
        encode(photos[0], "BMP"),
        encode(photos[0], "TIFF"),
        b"\x80\x04" * 50,
        b"",
    ):
        with pytest.raises(Unreadable):
            read_header(raw)


def test_sixteen_bits_and_animation(photos):
    stream = io.BytesIO()
    Image.fromarray(photos[0][:, :, 0].astype(np.uint16) * 256).save(stream, "PNG")
    with pytest.raises(Unreadable, match="16 bits"):
        read_header(stream.getvalue())
    stream, frames = io.BytesIO(), [Image.fromarray(photo) for photo in photos]
    frames[0].save(stream, "WEBP", save_all=True, append_images=frames[1:])
    with pytest.raises(Unreadable, match="animated"):
        read_header(stream.getvalue())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "npy"])
def test_noise_never_escapes_as_another_error(photos, encode, format):
    raw, rng = encode(photos[0][:24, :24], format), np.random.default_rng(0)
    for _ in range(2000):
        damaged = bytearray(raw)
        for place in rng.integers(0, min(len(raw), 700), rng.integers(1, 6)):
            damaged[place] = rng.integers(256)
        try:
            header = read_header(bytes(damaged))
        except Unreadable:
            continue
        assert 1 <= header.height * header.width <= MAX_PIXELS
