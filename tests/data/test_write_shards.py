"""Writing shards: what is read back is what was written, and nothing is ever left half-written."""

import io
import json
import shutil
import signal
import tarfile

import numpy as np
import pytest
from PIL import Image

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.tar_index import index_path
from duotone.data.write_shards import Sample, encode_image, write_shards

NOISE = np.random.default_rng(0).integers(0, 256, (7, 16, 16, 3), dtype=np.uint8)


def samples(count=7):
    for number in range(count):
        yield Sample(
            image=NOISE[number], captions=[f"noise {number}", "grün"], label=number % 2, source=f"{number}.png"
        )


@pytest.mark.parametrize("image_format", ["png", "npy"])
def test_round_trip_is_exact(tmp_path, cpu, plan_for, image_format):
    content = write_shards(samples(), tmp_path / "s", classes=["a", "b"], per_shard=3, image_format=image_format)
    assert content["count"] == 7 and list(content["shards"]) == ["00000.tar", "00001.tar", "00002.tar"]
    assert json.loads((tmp_path / "s" / "dataset.json").read_text()) == content
    dataset = Shards(shards=tmp_path / "s", size=16, resize="none").open(cpu, require_captions=True)
    batch = dataset.read(plan_for(range(7), captions=[0.9] * 7))
    assert (batch.images_NHWC.numpy() == NOISE).all() and batch.captions == ["grün"] * 7
    assert batch.labels_N.tolist() == [0, 1, 0, 1, 0, 1, 0] and dataset.classes == ["a", "b"]
    assert batch.keys == [f"{number:09d}" for number in range(7)]


@pytest.mark.parametrize("quality, halved", [(89, True), (90, False), (95, False)])
def test_jpeg_keeps_every_pixels_colour_from_quality_90(quality, halved):
    with Image.open(io.BytesIO(encode_image(NOISE[0], "jpg", quality))) as image:
        assert image.layer[0][1:3] == ((2, 2) if halved else (1, 1))


def test_members_are_what_webdataset_tools_expect(tmp_path):
    write_shards(samples(1), tmp_path / "s")
    with tarfile.open(tmp_path / "s" / "00000.tar") as tar:
        found = {info.name: tar.extractfile(info).read() for info in tar}
    assert set(found) == {"000000000.jpg", "000000000.txt", "000000000.json"}
    assert found["000000000.txt"] == b"noise 0"
    assert json.loads(found["000000000.json"]) == {"captions": ["noise 0", "grün"], "label": 0, "source": "0.png"}


def test_the_same_samples_give_the_same_bytes(tmp_path):
    for name in ("one", "two"):
        write_shards(samples(), tmp_path / name)
    assert (tmp_path / "one" / "00000.tar").read_bytes() == (tmp_path / "two" / "00000.tar").read_bytes()


def test_indexes_are_written_too(tmp_path, cpu, monkeypatch):
    write_shards(samples(), tmp_path / "s", per_shard=4)
    assert all(index_path(path).is_file() for path in (tmp_path / "s").glob("*.tar"))
    monkeypatch.setattr("duotone.data.tar_index.build_index", lambda shard: pytest.fail("indexed again"))
    assert Shards(shards=tmp_path / "s", size=16).open(cpu).count == 7


def test_long_keys_and_unicode_keys(tmp_path, cpu):
    keys = ["k" * 150, "写真/図", "plain"]
    write_shards((Sample(image=NOISE[0], key=key) for key in keys), tmp_path / "s")
    assert Shards(shards=tmp_path / "s", size=16).open(cpu).keys == keys


def test_what_exists_is_not_touched(tmp_path):
    for out in (tmp_path / "folder", tmp_path / "file", tmp_path / "link"):
        out.mkdir() if out.name == "folder" else out.symlink_to("nowhere") if out.name == "link" else out.touch()
        with pytest.raises(Refused, match="exists already"):
            write_shards(samples(), out)
    assert list((tmp_path / "folder").iterdir()) == []


@pytest.mark.parametrize("failure", [RuntimeError("disk"), KeyboardInterrupt(), Refused("bad picture")])
def test_nothing_is_left_when_a_sample_fails(tmp_path, failure):
    def failing():
        yield from samples(5)
        raise failure

    with pytest.raises(type(failure)):
        write_shards(failing(), tmp_path / "s", per_shard=2)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    def full(shard):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("duotone.data.write_shards.build_index", full)
    with pytest.raises(Refused, match="No space left on device"):
        write_shards(samples(), tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_caption_that_no_file_can_hold_is_refused(tmp_path):
    with pytest.raises(Refused, match="somewhere.jpg: a caption"):
        write_shards([Sample(image=NOISE[0], captions=["\ud800"], source="somewhere.jpg")], tmp_path / "s")


def test_no_samples_and_doubled_keys_are_refused(tmp_path):
    with pytest.raises(Refused, match="no images to write"):
        write_shards([], tmp_path / "s")
    with pytest.raises(Refused, match="'same'"):
        write_shards([Sample(image=NOISE[0], key="same")] * 2, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_parent_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot be written"):
        write_shards(samples(), tmp_path / "file" / "s")


@pytest.mark.parametrize("captions", [["x" * (1 << 20)], ["a" * (1 << 19), "b" * (1 << 19)]])
def test_captions_that_training_would_refuse_are_refused_by_their_pictures_name(tmp_path, captions):
    with pytest.raises(Refused, match="somewhere.jpg: its captions are too long: "):
        write_shards([Sample(image=NOISE[0], captions=captions, source="somewhere.jpg")], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sample", [{"image": b"no picture at all"}, {"image": NOISE[0], "label": -3}])
def test_no_shard_is_written_that_training_refuses(tmp_path, sample):
    bad = Sample(**({"extension": "jpg", "source": "cats/b.jpg"} | sample))
    with pytest.raises(Refused, match="^cats/b.jpg: "):
        write_shards([*samples(3), bad], tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_that_ends_the_process_leaves_nothing(tmp_path, monkeypatch, number, code):
    def stopped():
        yield from samples(5)
        signal.raise_signal(number)
        pytest.fail("the signal was not heard")

    heard = []
    before = signal.signal(number, signal.SIG_DFL)
    monkeypatch.setattr(
        "shutil.rmtree", lambda *a, rmtree=shutil.rmtree, **o: (heard.append(at(number)), rmtree(*a, **o))
    )
    try:
        with pytest.raises(SystemExit) as left:
            write_shards(stopped(), tmp_path / "s", per_shard=2)
        assert left.value.code == code and list(tmp_path.iterdir()) == []
        assert heard == [signal.SIG_IGN] and at(number) is signal.SIG_DFL  # a second one does not stop the clean-up
    finally:
        signal.signal(number, before)


def at(number):
    return signal.getsignal(number)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""

    def hung_up():
        yield from samples(5)
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert write_shards(hung_up(), tmp_path / "s")["count"] == 5
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_folder_that_another_process_writes_meanwhile_is_told(tmp_path):
    def overtaken():
        yield from samples(2)
        write_shards(samples(3), tmp_path / "s")

    with pytest.raises(Refused, match="s: another process has written it meanwhile; use "):
        write_shards(overtaken(), tmp_path / "s")
    assert json.loads((tmp_path / "s" / "dataset.json").read_text())["count"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
