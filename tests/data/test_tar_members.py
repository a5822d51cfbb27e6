"""Our walk through a tar against Python's tarfile and GNU tar, and against everything that can go wrong with a tar."""

import random
import shutil
import subprocess
import tarfile

import numpy as np
import pytest

from duotone.data.tar_members import Damaged, members

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NAMES = ["a.jpg", "folder/b.jpg", "dots.in.name.txt", "long/" + "x" * 90 + "/" + "y" * 90 + ".json", "empty.txt"]
LONGER = ["z" * 180 + ".png", "straße/картина/写真.jpg"]


def walk(path):
    return list(members(np.frombuffer(path.read_bytes(), dtype=np.uint8)))


def by_tarfile(path):
    with tarfile.open(path) as tar:
        return [(info.name, info.offset_data, info.size) for info in tar if info.isfile()]


def content(name):
    return b"" if name.startswith("empty") else name.encode() * 37


@pytest.mark.parametrize("format", FORMATS)
def test_agrees_with_tarfile(tmp_path, write_tar, format):
    names = NAMES + (LONGER if format != "ustar" else [])
    path = write_tar(tmp_path / "a.tar", [(name, content(name)) for name in names], FORMATS[format])
    found = walk(path)
    assert [(member.name, member.offset, member.size) for member in found] == by_tarfile(path)
    raw = path.read_bytes()
    assert all(raw[member.offset : member.offset + member.size] == content(member.name) for member in found)


@pytest.mark.parametrize("format", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_agrees_with_gnu_tar(tmp_path, format):
    tar = shutil.which("tar")
    if tar is None or b"GNU tar" not in subprocess.run([tar, "--version"], capture_output=True).stdout:
        pytest.skip("GNU tar is not installed")
    names = ["a.jpg", "b.txt", "sub/c.json"] if format == "v7" else NAMES + (LONGER if format != "ustar" else [])
    for name in names:
        file = tmp_path / "in" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content(name))
    path = tmp_path / "out.tar"
    subprocess.run([tar, f"--format={format}", "--sort=name", "-cf", path, "-C", tmp_path / "in", "."], check=True)
    found = walk(path)
    assert [(member.offset, member.size) for member in found] == [found[1:] for found in by_tarfile(path)]
    assert sorted(member.name.removeprefix("./") for member in found) == sorted(names)


def test_sizes_beyond_octal(tmp_path, write_tar):
    """GNU and PAX write sizes from 8 GiB on in their own ways; here, small sizes are written like that by hand."""
    raw = bytearray(write_tar(tmp_path / "a.tar", [("a.jpg", b"x" * 700)]).read_bytes())
    raw[124:136] = (0x80).to_bytes(1, "big") + (700).to_bytes(11, "big")
    assert [member.size for member in members(np.frombuffer(resealed(raw), np.uint8))] == [700]
    pax = tarfile.TarInfo("b.jpg")
    pax.pax_headers, pax.size = {"size": "700"}, 0
    header = pax.tobuf(tarfile.PAX_FORMAT)
    archive = header + b"x" * 700 + bytes(1024 - 700) + bytes(1024)
    assert [member.size for member in members(np.frombuffer(archive, np.uint8))] == [700]


def resealed(raw):
    """Corrects the checksum of the first header."""
    raw[148:156] = b" " * 8
    raw[148:156] = b"%06o\0 " % sum(raw[:512])
    return bytes(raw)


def test_any_truncation_is_damage(tmp_path, write_tar, members_of):
    raw = write_tar(tmp_path / "a.tar", members_of(4)).read_bytes()
    end = max(index for index, byte in enumerate(raw) if byte) // 512 * 512 + 512
    lengths = {0, 1, 511, 512, 513, end, end + 512, end + 1023} | set(random.Random(0).sample(range(end), 200))
    for length in lengths:
        with pytest.raises(Damaged):
            list(members(np.frombuffer(raw[:length], dtype=np.uint8)))


def test_any_flipped_bit_in_a_header_is_damage(tmp_path, write_tar):
    raw = write_tar(tmp_path / "a.tar", [("a.jpg", b"one"), ("a.txt", b"two")]).read_bytes()
    whole = list(members(np.frombuffer(raw, np.uint8)))
    for bit in range(8 * 1024, 8 * 1536):  # the second header
        flipped = bytearray(raw)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = list(members(np.frombuffer(bytes(flipped), np.uint8)))
        except Damaged:
            continue
        assert found == whole  # a blank instead of a zero around the checksum means the same


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"Z"])
def test_what_is_not_a_file_is_refused(tmp_path, kind):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("evil.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(Damaged, match="evil.jpg"):
        walk(path)


def test_sparse_files_are_refused(tmp_path):
    tar = shutil.which("tar")
    if tar is None:
        pytest.skip("tar is not installed")
    with (tmp_path / "hole.jpg").open("wb") as file:
        file.truncate(1 << 20)
        file.write(b"start")
    for format in ("gnu", "posix"):
        path = tmp_path / f"{format}.tar"
        subprocess.run([tar, f"--format={format}", "-S", "-cf", path, "-C", tmp_path, "hole.jpg"], check=True)
        with pytest.raises(Damaged, match="sparse"):
            walk(path)


def pax_archive(records):
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, len(records)
    file = tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)
    return header.tobuf(tarfile.USTAR_FORMAT) + records.ljust(-(-len(records) // 512) * 512, b"\0") + file + bytes(1024)


@pytest.mark.parametrize(
    "records",
    [
        b"9999 path=x\n",
        b"11 path=abc",
        b"x path=abc\n",
        b"12 pathabcde\n",
        b"13 size=-700\n",
        b"15 size=99999999999999999999\n",
    ],
)
def test_pax_headers_that_lie(records):
    with pytest.raises(Damaged):
        list(members(np.frombuffer(pax_archive(records), np.uint8)))


def test_a_huge_extension_is_not_read(tmp_path):
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 30
    path = tmp_path / "a.tar"
    with path.open("wb") as file:
        file.write(info.tobuf(tarfile.USTAR_FORMAT))
        file.truncate((1 << 30) + 2048)
    with pytest.raises(Damaged, match="extension"):
        list(members(np.memmap(path, dtype=np.uint8, mode="r")))


@pytest.mark.parametrize(
    "raw, reason",
    [
        (b"", "truncated"),
        (b"\x1f\x8b" + bytes(2000), "gzip"),
        (b"hello " * 500, "not a tar"),
        (b"\xff\xd8\xff" + bytes(2000), "not a tar"),
    ],
)
def test_what_is_no_tar(raw, reason):
    with pytest.raises(Damaged, match=reason):
        list(members(np.frombuffer(raw, np.uint8)))


def test_joined_tars_are_refused(tmp_path, write_tar):
    raw = write_tar(tmp_path / "a.tar", [("a.jpg", b"one")]).read_bytes()
    with pytest.raises(Damaged, match="cat"):
        list(members(np.frombuffer(raw + raw, np.uint8)))
