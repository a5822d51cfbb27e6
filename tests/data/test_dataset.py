"""Opening and reading shards: what comes out, in which order, and what is refused in one line."""

import gc
import io
import json
import os
import resource
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from duotone.data.refusal import Refused, SampleReplaced
from duotone.data.shards import Shards
from duotone.data.write_shards import Sample, write_shards


def opened(folder, cpu, require_captions=False, **options):
    options = {"size": 32, "decoder": "pillow"} | options
    return Shards(shards=folder, **options).open(cpu, require_captions)


def refusal(folder, cpu, require_captions=False, **options):
    with pytest.raises(Refused) as refused:
        opened(folder, cpu, require_captions, **options)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_reads_samples_by_number(shard_folder, cpu, plan_for):
    dataset = opened(shard_folder, cpu, require_captions=True)
    assert (dataset.count, dataset.has_captions, dataset.decoder, dataset.decoder_note) == (12, True, "pillow", None)
    batch = dataset.read(plan_for([11, 0, 7, 0]))
    assert batch.keys == ["00011", "00000", "00007", "00000"]
    assert batch.captions == ["picture 11", "picture 0", "picture 7", "picture 0"]
    assert batch.labels_N.tolist() == [2, 0, 1, 0] and batch.labels_N.dtype == torch.int64
    assert batch.images_NHWC.shape == (4, 32, 32, 3) and batch.images_NHWC.dtype == torch.uint8
    assert (batch.images_NHWC[1] == batch.images_NHWC[3]).all() and not batch.skipped
    assert dataset.captions_at(5) == ["picture 5"] and dataset.labels_N.tolist() == [n % 3 for n in range(12)]


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_an_image_does_not_depend_on_its_batch(shard_folder, cpu, plan_for, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    dataset = opened(shard_folder, cpu, decoder=decoder)
    whole = dataset.read(plan_for(range(12))).images_NHWC
    for sample in (0, 6, 11):
        assert (dataset.read(plan_for([sample])).images_NHWC[0] == whole[sample]).all()
    assert (dataset.read(plan_for(range(11, -1, -1))).images_NHWC.flip(0) == whole).all()


def test_one_of_all_captions_is_drawn(tmp_path, cpu, plan_for):
    image = np.zeros((8, 8, 3), np.uint8)
    samples = [Sample(image=image, captions=["one", "two", "three"]), Sample(image=image, captions=["only"])]
    write_shards(samples, tmp_path / "s")
    dataset = opened(tmp_path / "s", cpu, size=8)
    for draw, expected in ((0.0, "one"), (0.34, "two"), (0.99999, "three"), (np.nextafter(1, 0), "three")):
        assert dataset.read(plan_for([0, 1], captions=[draw, draw])).captions == [expected, "only"]


def test_captions_by_source(tmp_path, write_tar, members_of, cpu):
    image = members_of(1)[0][1]
    members = [
        *[
            ("a.jpg", image),
            ("a.txt", b"from text"),
            ("a.json", b'{"captions": ["from list", " ", 7], "caption": "x"}'),
        ],
        *[("b.jpg", image), ("b.txt", b"first line\n\nsecond line\n"), ("b.json", b'{"caption": "x"}')],
        *[("c.jpg", image), ("c.json", b'{"caption": "from json", "url": null}')],
        *[("d.jpg", image), ("d.txt", "\ufeffschön".encode())],
    ]
    write_tar(tmp_path / "s" / "0.tar", members)
    dataset = opened(tmp_path / "s", cpu, require_captions=True)
    found = [dataset.captions_at(sample) for sample in range(4)]
    assert found == [["from list"], ["first line", "second line"], ["from json"], ["schön"]]


def test_missing_captions(tmp_path, shard_folder, write_tar, members_of, cpu, plan_for):
    members = members_of(3)
    write_tar(tmp_path / "some" / "0.tar", [one for one in members if one[0] not in ("00001.txt", "00001.json")])
    write_tar(tmp_path / "none" / "0.tar", [one for one in members if one[0].endswith("jpg")])
    assert "'00001'" in refusal(tmp_path / "some", cpu, require_captions=True)
    assert "it has no captions" in refusal(tmp_path / "none", cpu, require_captions=True)
    assert opened(tmp_path / "none", cpu).read(plan_for([0])).captions is None
    assert opened(tmp_path / "none", cpu).has_captions is False


def test_a_folder_may_be_written_as_text(tmp_path):
    assert Shards(shards=str(tmp_path)) == Shards(shards=tmp_path)
    with pytest.raises(Refused, match="it holds no .tar shards"):
        Shards(shards=str(tmp_path)).open(torch.device("cpu"))


def test_folders_that_are_refused(tmp_path, cpu, shard_folder, write_tar):
    assert "data.shards" in refusal(None, cpu)
    assert "no such folder" in refusal(tmp_path / "missing", cpu)
    assert "it is a file" in refusal(shard_folder / "00000.tar", cpu)
    (tmp_path / "empty").mkdir()
    assert "no .tar shards" in refusal(tmp_path / "empty", cpu)
    write_tar(tmp_path / "blank" / "0.tar", [])
    assert "no images" in refusal(tmp_path / "blank", cpu)
    for name, remedy in (("1.tar.gz", "gunzip"), ("1.TGZ", "gunzip"), ("1.tar.zst", "unzstd")):
        for folder in (shard_folder, tmp_path / "empty"):
            (folder / name).touch()
            assert f"{name}: it is packed" in (said := refusal(folder, cpu)) and f"(`{remedy} {folder}/{name}`)" in said
            (folder / name).unlink()
    (shard_folder / "00000.tar.gz").touch()  # what 00000.tar was unpacked from
    (shard_folder / "00001.tar").write_bytes(b"hello" * 1000)
    assert "00001.tar: it is not a tar" in refusal(shard_folder, cpu)
    (shard_folder / "00001.tar").write_bytes((shard_folder / "00000.tar").read_bytes()[:9000])
    assert "00001.tar: it is truncated" in refusal(shard_folder, cpu)


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 8, "pad": 4}, {"channels": 2}, {"threads": 0}, {"pad": -1}])
def test_nonsense_options_are_refused(options):
    with pytest.raises(Refused, match="data."):
        Shards(**options)


def test_labels_and_attributes_must_be_whole(tmp_path, cpu, write_tar, members_of):
    members = members_of(4)
    write_tar(tmp_path / "a" / "0.tar", [one for one in members if one[0] not in ("00002.json",)])
    assert "'00002'" in refusal(tmp_path / "a", cpu)
    images = [Sample(image=np.zeros((8, 8, 3), np.uint8), label=2, attributes=[1, 0]) for _ in range(2)]
    write_shards(images, tmp_path / "b", classes=["x", "y"])
    assert "label 2" in refusal(tmp_path / "b", cpu, size=8)
    write_shards(images, tmp_path / "c", attributes=["x", "y", "z"])
    assert "2 attributes" in refusal(tmp_path / "c", cpu, size=8)


def test_attributes(tmp_path, cpu, plan_for):
    images = [Sample(image=np.zeros((8, 8, 3), np.uint8), attributes=[1, -1, number]) for number in range(2)]
    write_shards(images, tmp_path / "s", attributes=["x", "y", "z"])
    dataset = opened(tmp_path / "s", cpu, size=8)
    batch = dataset.read(plan_for([1, 0]))
    assert batch.attributes_NK.tolist() == [[1, -1, 1], [1, -1, 0]] and batch.attributes_NK.dtype == torch.int8
    assert dataset.attributes == ["x", "y", "z"] and batch.labels_N is None and batch.captions is None


def test_stored_images_are_exact(tmp_path, cpu, plan_for):
    images = np.random.default_rng(0).integers(0, 256, (9, 28, 28, 1), dtype=np.uint8)
    write_shards((Sample(image=image, label=0) for image in images), tmp_path / "s", image_format="npy", per_shard=4)
    dataset = opened(tmp_path / "s", cpu, size=32, pad=2, channels=1, resize="none")
    batch = dataset.read(plan_for(range(9)))
    assert dataset.decoder == "stored"
    assert (batch.images_NHWC.numpy()[:, 2:-2, 2:-2] == images).all()
    assert batch.images_NHWC.sum() == images.astype(int).sum()  # the border is black


def test_colour_and_gray_are_what_is_asked(tmp_path, cpu, plan_for, photos):
    gray = np.asarray(Image.fromarray(photos[0][:32, :32]).convert("L"))
    samples = [Sample(image=photos[0][:32, :32]), Sample(image=gray[:, :, None])]
    write_shards(samples, tmp_path / "npy", image_format="npy")
    write_shards(samples, tmp_path / "png", image_format="png")
    for folder in ("npy", "png"):
        one = opened(tmp_path / folder, cpu, channels=1).read(plan_for([0, 1])).images_NHWC
        assert one.shape == (2, 32, 32, 1) and (one[0] == one[1]).all() and (one[0, :, :, 0].numpy() == gray).all()
        three = opened(tmp_path / folder, cpu, channels=3).read(plan_for([1])).images_NHWC
        assert (three[0].numpy() == gray[:, :, None]).all()


def test_size_none_must_match(tmp_path, cpu, shard_folder):
    message = refusal(shard_folder, cpu, resize="none", size=64)
    assert "64 x 48, not 64 x 64" in message and "'00000'" in message
    assert message.endswith("use --data.resize crop, or another --data.size")


def test_a_border_has_no_room_in_images_of_the_full_size(tmp_path, cpu):
    write_shards([Sample(image=np.zeros((32, 32, 3), np.uint8))], tmp_path / "s")
    message = refusal(tmp_path / "s", cpu, resize="none", size=32, pad=2)
    assert message.endswith("the image is 32 x 32, not 28 x 28; use --data.pad 0")
    assert opened(tmp_path / "s", cpu, resize="none", size=32).count == 1


@pytest.mark.parametrize("resize", ["crop", "squash"])
def test_enlarged_images_are_noted(tmp_path, cpu, write_tar, encode, resize):
    """The third is turned by its EXIF, which swaps height and width; the fourth cannot be read."""
    sides, turned = [(40, 60), (32, 32), (60, 31), (20, 20)], Image.Exif()
    turned[0x0112] = 6
    raws = [encode(np.zeros((*side, 3), np.uint8), exif=turned if i == 2 else b"") for i, side in enumerate(sides)]
    raws[3] = raws[3][:-2]
    write_tar(tmp_path / "s" / "0.tar", [(f"{number}.jpg", raw) for number, raw in enumerate(raws)])

    def noted(**options):
        notes = opened(tmp_path / "s", cpu, resize=resize, on_bad="replace", **options).notes
        return [note for note in notes if note.startswith("images smaller")]

    assert noted(size=31) == noted(size=33, pad=1) == []
    assert noted(size=32) == ["images smaller than data.size = 32, which are enlarged: 1 of 4"]
    assert noted(size=192) == ["images smaller than data.size = 192, which are enlarged: 3 of 4"]
    padded = "images smaller than data.size = 40 less data.pad = 2 on either side, which are enlarged: 2 of 4"
    assert noted(size=40, pad=2) == [padded]


TRANSPARENT = [
    ("RGBA", "png", {}),
    ("LA", "png", {}),
    ("P", "png", {"transparency": 0}),
    ("RGBA", "webp", {}),
    ("RGBA", "webp", {"lossless": True}),
]
OPAQUE = [
    ("RGB", "png", {}),
    ("L", "png", {}),
    ("P", "png", {}),
    ("RGB", "webp", {}),
    ("RGB", "webp", {"lossless": True}),
    ("CMYK", "jpg", {}),
]


def test_images_with_transparent_parts_are_noted(tmp_path, cpu, write_tar, plan_for):
    """Readers ignore alpha, so training sees the colour beneath."""

    def stored(mode, extension, options):
        raw, image = io.BytesIO(), Image.new("RGBA", (32, 32), (200, 30, 30, 0))
        image = image.convert(mode) if mode in ("RGBA", "LA") else image.convert("RGB").convert(mode)
        image.save(raw, {"jpg": "jpeg"}.get(extension, extension), **options)
        return extension, raw.getvalue()

    for name, kinds in (("mixed", [*TRANSPARENT, *OPAQUE]), ("opaque", OPAQUE)):
        images = [stored(*kind) for kind in kinds]
        write_tar(tmp_path / name / "0.tar", [(f"{i}.{extension}", raw) for i, (extension, raw) in enumerate(images)])
    dataset = opened(tmp_path / "mixed", cpu)
    assert [note for note in dataset.notes if "transparent" in note] == [
        "images whose transparent parts show the colour beneath: 5 of 11; `duotone prepare folder` lays pictures on white"
    ]
    assert abs(dataset.read(plan_for([0])).images_NHWC[0, 0, 0].int() - torch.tensor([200, 30, 30])).max() <= 1
    assert opened(tmp_path / "opaque", cpu).notes == []


def test_bad_images_are_refused_by_name(tmp_path, cpu, write_tar, members_of):
    members = members_of(3)
    members[3] = ("00001.jpg", members[3][1][:-40])
    write_tar(tmp_path / "s" / "0.tar", members)
    message = refusal(tmp_path / "s", cpu)
    assert "0.tar: key '00001'" in message and "truncated" in message and "--data.on-bad replace" in message


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_bad_images_can_be_replaced(tmp_path, cpu, write_tar, members_of, plan_for, encode, photos, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    members = members_of(5)
    members[3] = ("00001.jpg", members[3][1][:-40])  # the header shows it
    broken = bytearray(encode(photos[0][:48, :64], "PNG"))
    broken[300:340] = bytes(40)  # only a decoder can tell
    members[6] = ("00002.png", bytes(broken))
    write_tar(tmp_path / "s" / "0.tar", members)
    dataset = opened(tmp_path / "s", cpu, on_bad="replace", decoder=decoder)
    batch = dataset.read(plan_for([0, 1, 2, 3]))
    assert batch.keys == ["00000", "00003", "00003", "00003"] and batch.positions_N.tolist() == [0, 1, 2, 3]
    assert [line.partition(":")[0] for line in batch.skipped] == ["00001", "00002"]
    assert batch.captions == ["picture 0", "picture 3", "picture 3", "picture 3"]
    with pytest.raises(Refused, match="'00002'"):
        strict = opened(tmp_path / "s", cpu, on_bad="replace", decoder=decoder)
        strict.on_bad = "refuse"
        strict.read(plan_for([0, 2]))


def test_when_no_image_can_be_read(tmp_path, cpu, write_tar, members_of, plan_for):
    write_tar(tmp_path / "s" / "0.tar", [(name, raw[:90] if "jpg" in name else raw) for name, raw in members_of(3)])
    with pytest.raises(Refused, match="no image can be read"):
        opened(tmp_path / "s", cpu, on_bad="replace").read(plan_for([0]))


@pytest.mark.parametrize("part", ["image", "txt", "json"])
def test_bytes_that_changed_behind_the_index_are_refused(shard_folder, cpu, plan_for, part):
    dataset = opened(shard_folder, cpu)
    shard = shard_folder / "00000.tar"
    stat, raw = shard.stat(), bytearray(shard.read_bytes())
    raw[int(dataset.columns[f"{part}_offset"][3]) + 5] ^= 1
    shard.write_bytes(raw)
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    changed = opened(shard_folder, cpu)
    if part == "txt":  # the JSON also has the caption, but not as a list, so the .txt is read
        assert changed.columns["json_size"][3] > 0
    with pytest.raises(Refused, match=r"00000.tar: key '00003'.*checksum"):
        changed.read(plan_for([0, 3]))
    dataset = opened(shard_folder, cpu, on_bad="replace")
    with pytest.warns(SampleReplaced, match="key '00003'.*the next sample is read instead"):
        replaced = dataset.read(plan_for([0, 3]))
    assert len(dataset.unread()) == 1
    assert replaced.keys == ["00000", "00004"] and "checksum" in replaced.skipped[0]


def test_the_manifest_guards_the_shards(tmp_path, cpu):
    images = [Sample(image=np.full((8, 8, 3), number, np.uint8)) for number in range(9)]
    write_shards(images, tmp_path / "s", per_shard=3)
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    assert opened(tmp_path / "copy", cpu, size=8).fingerprint == opened(tmp_path / "s", cpu, size=8).fingerprint
    (tmp_path / "copy" / "00001.tar").rename(tmp_path / "copy" / "00009.tar")
    assert "00001.tar is missing" in refusal(tmp_path / "copy", cpu, size=8)
    shutil.copy(tmp_path / "s" / "00001.tar", tmp_path / "copy")
    assert "00009.tar is not named" in refusal(tmp_path / "copy", cpu, size=8)
    (tmp_path / "copy" / "00009.tar").unlink()
    shutil.copy(tmp_path / "s" / "00002.tar", tmp_path / "copy" / "00001.tar")
    assert "00001.tar: its content is not what dataset.json says" in refusal(tmp_path / "copy", cpu, size=8)
    (tmp_path / "copy" / "dataset.json").write_text('{"format": "duotone-shards", "shards": 5}')
    assert "dataset.json: it is damaged" in refusal(tmp_path / "copy", cpu, size=8)


def test_a_foreign_dataset_json_is_noted(shard_folder, cpu):
    (shard_folder / "dataset.json").write_text(json.dumps({"name": "mine"}))
    assert any("dataset.json" in note for note in opened(shard_folder, cpu).notes)


def test_the_fingerprint_follows_the_data(shard_folder, cpu, write_tar, members_of):
    first = opened(shard_folder, cpu).fingerprint
    assert opened(shard_folder, cpu, size=16).fingerprint == first
    write_tar(shard_folder / "00001.tar", [(name, raw.replace(b"11", b"12")) for name, raw in members_of(12)[21:]])
    assert opened(shard_folder, cpu).fingerprint != first


def test_batches_follow_their_plans(shard_folder, cpu, plan_for):
    dataset = opened(shard_folder, cpu)
    plans = [plan_for([number, (number + 5) % 12]) for number in range(12)]
    found = [batch.keys for batch in dataset.batches(iter(plans), ahead=3)]
    assert found == [[f"{n:05d}", f"{(n + 5) % 12:05d}"] for n in range(12)]


def test_an_endless_reader_ends_when_it_is_dropped(shard_folder, cpu, plan_for):
    dataset = opened(shard_folder, cpu)

    def endless():
        while True:
            yield plan_for([1, 2])

    batches = dataset.batches(endless())
    next(batches)
    assert any(thread.name == "duotone-data" for thread in threading.enumerate())
    del batches
    gc.collect()
    assert not any(thread.name == "duotone-data" for thread in threading.enumerate())


def test_a_refusal_reaches_the_consumer(shard_folder, cpu, plan_for):
    dataset = opened(shard_folder, cpu)
    dataset.columns["image_crc"][4] ^= 1
    batches = dataset.batches([plan_for([0]), plan_for([4]), plan_for([5])])
    assert next(batches).keys == ["00000"]
    with pytest.raises(Refused, match="'00004'"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_without_dali_pillow_decodes_and_it_is_said(shard_folder, cpu, monkeypatch):
    monkeypatch.setattr("duotone.data.shards.find_spec", lambda name: None)
    dataset = opened(shard_folder, cpu, decoder="auto")
    assert dataset.decoder == "pillow" and "nvidia.dali is not installed" in dataset.decoder_note
    assert "nvidia-dali" in refusal(shard_folder, cpu, decoder="dali")


def test_webdataset_reads_the_same(shard_folder, cpu, plan_for):
    webdataset = pytest.importorskip("webdataset")
    dataset = opened(shard_folder, cpu)
    theirs = [
        (sample["__key__"], sample["txt"].decode())
        for path in dataset.paths
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    ours = dataset.read(plan_for(range(12)))
    assert theirs == list(zip(ours.keys, ours.captions))


def test_more_shards_than_files_may_be_open(tmp_path, cpu, plan_for):
    images = [Sample(image=np.full((8, 8, 3), number, np.uint8)) for number in range(40)]
    write_shards(images, tmp_path / "s", per_shard=1, image_format="npy")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, before[1]))
    try:
        assert opened(tmp_path / "s", cpu, size=8).read(plan_for([39])).images_NHWC.unique().tolist() == [39]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_caption_ends_where_its_line_does(tmp_path, cpu, write_tar, members_of):
    said = "Vintage poster\x85A red fox\u2028by J. Doe\x0b\x0c\x1c\x1d\x1e!"
    write_tar(tmp_path / "s" / "0.tar", [members_of(1)[0], ("00000.txt", f"{said}\r\ntwo\rthree\n\n".encode())])
    assert opened(tmp_path / "s", cpu).captions_at(0) == [said, "two", "three"]


def test_a_refusal_is_one_line_whatever_a_name_holds(tmp_path, cpu):
    folder = tmp_path / "a\nb\x1b[31m\u2028c\x85"
    assert f"{tmp_path}/a\\nb\\x1b[31m\\u2028c\\x85: there is no such folder" in refusal(folder, cpu)
