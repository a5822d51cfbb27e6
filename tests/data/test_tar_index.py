"""The index beside a shard: correct, reused, rebuilt after any change, refused for members that cannot be paired."""

import json
import os
import random
import resource
import zlib

import numpy as np
import pytest

from duotone.data.refusal import Refused
from duotone.data.tar_index import SPARE_FILES, _sealed, allow_open, build_index, index_path, open_index, save_index


@pytest.fixture
def shard(tmp_path, write_tar, members_of):
    return write_tar(tmp_path / "00000.tar", members_of(6))


def test_points_at_the_bytes(shard, members_of):
    index, raw, members = build_index(shard), shard.read_bytes(), dict(members_of(6))
    assert index.keys == [f"{number:05d}" for number in range(6)]
    for part, extension in (("image", "jpg"), ("txt", "txt"), ("json", "json")):
        for sample, key in enumerate(index.keys):
            offset, size, crc = (int(index.columns[f"{part}_{what}"][sample]) for what in ("offset", "size", "crc"))
            assert raw[offset : offset + size] == members[f"{key}.{extension}"]
            assert crc == zlib.crc32(members[f"{key}.{extension}"])
    assert index.columns["height"].tolist() == [48] * 6 and index.columns["width"].tolist() == [64] * 6
    assert index.columns["label"].tolist() == [0, 1, 2, 0, 1, 2]


def same(one, other):
    columns = all((one.columns[name] == other.columns[name]).all() for name in one.columns)
    return columns and one.keys == other.keys and one.fingerprint == other.fingerprint


def test_is_kept_and_reused(shard):
    built = open_index(shard)
    kept = index_path(shard).stat().st_mtime_ns
    assert same(open_index(shard), built) and same(build_index(shard), built)
    assert index_path(shard).stat().st_mtime_ns == kept
    assert [path.name for path in shard.parent.iterdir() if path.name.startswith(".")] == []


def test_is_rebuilt_after_a_change(shard, write_tar, members_of):
    first = open_index(shard)
    write_tar(shard, members_of(7))
    assert len(open_index(shard).keys) == 7
    stat = shard.stat()
    write_tar(shard, [(name, raw.replace(b"picture 0", b"picture 9")) for name, raw in members_of(6)])
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert open_index(shard).fingerprint != first.fingerprint


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"version":1}', "[" * 100_000])
def test_what_is_no_index_is_rebuilt(shard, damage):
    built = open_index(shard)
    whole = index_path(shard).read_text()
    for text in (damage, _sealed(damage)):
        index_path(shard).write_text(text)
        assert same(open_index(shard), built) and index_path(shard).read_text() == whole


@pytest.mark.parametrize("damage", ["lengths", "outside", "types", "old"])
def test_an_index_that_makes_no_sense_is_rebuilt(shard, damage):
    built = open_index(shard)
    content = json.loads(index_path(shard).read_text())
    del content["sha256"]
    if damage == "lengths":
        content["label"] = content["label"][:-1]
    elif damage == "outside":
        content["image_offset"][2] = 10**9
    elif damage == "types":
        content["image_offset"][2] = "here"
    else:
        content["version"] = 0
    index_path(shard).write_text(_sealed(json.dumps(content)))
    assert same(open_index(shard), built)
    assert json.loads(index_path(shard).read_text())["keys"] == built.keys


def test_any_flipped_bit_in_the_index_is_seen(shard):
    built, rng = open_index(shard), random.Random(0)
    whole = index_path(shard).read_bytes()
    for _ in range(200):
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        index_path(shard).write_bytes(flipped)
        assert same(open_index(shard), built) and index_path(shard).read_bytes() == whole


def test_a_folder_that_cannot_be_written_is_noted(shard, monkeypatch):
    def fail(path, text):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("duotone.data.tar_index.write_whole", fail)
    index = open_index(shard)
    assert len(index.keys) == 6 and "Permission denied" in index.note


def test_a_failed_write_leaves_nothing(shard, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        save_index(shard, build_index(shard))
    assert [path.name for path in shard.parent.iterdir()] == [shard.name]


def refusal(tmp_path, write_tar, members):
    with pytest.raises(Refused) as refused:
        build_index(write_tar(tmp_path / "bad.tar", members))
    message = str(refused.value)
    assert "bad.tar" in message and "\n" not in message
    return message


def test_refuses_what_cannot_be_paired(tmp_path, write_tar, members_of):
    first, _, third = members_of(3)[0:3], members_of(3)[3:6], members_of(3)[6:9]
    assert "'00000'" in refusal(tmp_path, write_tar, first + third + first[:1])
    assert "not next to each other" in refusal(tmp_path, write_tar, [first[0], *third, *first[1:]])
    assert "two members .jpg" in refusal(tmp_path, write_tar, [first[0], first[0]])
    assert "no image" in refusal(tmp_path, write_tar, [*first, ("lonely.txt", b"text")])
    assert "2 images" in refusal(tmp_path, write_tar, [first[0], ("00000.png", first[0][1])])


@pytest.mark.parametrize("name", ["/etc/a.jpg", "../a.jpg", "x/../../a.jpg", "a\nb.jpg", "a\\b.jpg", "a\x1b[31m.jpg"])
def test_refuses_unsafe_names(tmp_path, write_tar, members_of, name):
    assert "unsafe" in refusal(tmp_path, write_tar, [(name, members_of(1)[0][1])])


def test_other_members_are_counted_not_read(tmp_path, write_tar, members_of):
    others = [("00000.pyd", b"\x80\x04"), ("00000.pth", b"x"), ("00000.cls", b"1"), (".hidden", b""), ("README", b"")]
    index = build_index(write_tar(tmp_path / "a.tar", [*members_of(1), *others, ("00000.npy", b"embedding")]))
    assert index.keys == ["00000"] and not index.bad
    assert index.ignored == {"pyd": 1, "pth": 1, "cls": 1, "npy": 1, "(hidden or without extension)": 2}


def test_names_as_webdataset_splits_them(tmp_path, write_tar, members_of):
    image = members_of(1)[0][1]
    names = ["./folder/a.jpg", "folder.with.dots/b.JPG", "c.seg.jpg", "d.jpeg"]
    index = build_index(write_tar(tmp_path / "a.tar", [(name, image) for name in names]))
    assert index.keys == ["folder/a", "folder.with.dots/b", "d"] and index.ignored == {"seg.jpg": 1}


def test_images_and_texts_that_cannot_be_used_are_recorded(tmp_path, write_tar, members_of, encode, photos):
    image = members_of(1)[0][1]
    members = [
        ("good.jpg", image),
        ("cut.jpg", image[:-50]),
        ("empty.jpg", b""),
        ("gif.jpg", encode(photos[0][:9, :9], "GIF", "P")),
        ("array.npy", image),
        ("text.jpg", image),
        ("text.txt", b"\xff\xfe"),
        ("json.jpg", image),
        ("json.json", b'{"captions": '),
        ("deep.jpg", image),
        ("deep.json", b"[" * 100_000),
        ("label.jpg", image),
        ("label.json", b'{"label": "cat"}'),
        ("half.jpg", image),
        ("half.json", b'{"captions": ["\\ud800"]}'),
    ]
    index = build_index(write_tar(tmp_path / "a.tar", members))
    reasons = {index.keys[sample]: reason for sample, reason in index.bad.items()}
    assert set(reasons) == {"cut", "empty", "gif", "array", "text", "json", "deep", "label", "half"}
    assert "truncated" in reasons["cut"] and "UTF-8" in reasons["text"] and "JSON" in reasons["deep"]


def test_empty_shard(tmp_path, write_tar):
    index = build_index(write_tar(tmp_path / "a.tar", []))
    assert index.keys == [] and all(
        column.shape == (0,) and column.dtype == np.int64 for column in index.columns.values()
    )


def test_too_many_open_files_have_a_remedy(shard, monkeypatch):
    def full(*_, **__):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(np, "memmap", full)
    with pytest.raises(Refused, match="Too many open files.; raise `ulimit -n`, or pack fewer, larger shards"):
        build_index(shard)


@pytest.mark.parametrize("shards, raised", [(1000 - SPARE_FILES, False), (1001 - SPARE_FILES, True)])
def test_the_limit_of_open_files_is_raised_where_it_must_be(monkeypatch, shards, raised):
    limits = []
    monkeypatch.setattr(os, "listdir", lambda path: ["0"] * 24)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda which, both: limits.append((which, both)))
    allow_open(shards)
    assert limits == [(resource.RLIMIT_NOFILE, (4096, 4096))] * raised
