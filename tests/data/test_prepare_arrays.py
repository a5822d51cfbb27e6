"""prepare idx and cifar10: arrays become shards, pixel for pixel; any other file is refused, and never unpickled."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from duotone.data.prepare.cifar10 import CLASSES, PrepareCifar10, read_pickled_arrays
from duotone.data.prepare.idx import GARMENTS, PrepareIdx, read_idx
from duotone.data.refusal import Refused
from duotone.data.shards import Shards

FASHION = Path("/usr/share/datasets/fashion-mnist")
DIGITS = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
LABELS = np.arange(20, dtype=np.uint8) % 10


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def refusal(config):
    with pytest.raises(Refused) as refused:
        config.run()
    assert "\n" not in str(refused.value) and not config.out.exists()
    return str(refused.value)


@pytest.fixture
def files(tmp_path):
    (tmp_path / "images").write_bytes(idx(DIGITS))
    (tmp_path / "labels.gz").write_bytes(gzip.compress(idx(LABELS)))
    return {"images": tmp_path / "images", "labels": tmp_path / "labels.gz", "out": tmp_path / "out"}


@pytest.mark.parametrize("image_format", ["npy", "png"])
def test_idx_pixel_for_pixel(files, cpu, plan_for, image_format):
    summary = PrepareIdx(**files, names="mnist", image_format=image_format).run()
    assert (summary["images"], summary["size"]) == (20, [28, 28])
    dataset = Shards(shards=files["out"], size=32, pad=2, channels=1, resize="none").open(cpu, require_captions=True)
    batch = dataset.read(plan_for(range(20)))
    assert (batch.images_NHWC.numpy()[:, 2:-2, 2:-2, 0] == DIGITS).all() and batch.labels_N.tolist() == LABELS.tolist()
    assert batch.captions[3] == "the handwritten digit three" and dataset.classes[3] == "three"


def test_idx_names(files, cpu):
    named = PrepareIdx(**files, classes=tuple("abcdefghij"), caption="letter {}").run()
    assert named["classes"] == list("abcdefghij")
    assert Shards(shards=files["out"], channels=1).open(cpu).captions_at(2) == ["letter c"]
    bare = PrepareIdx(images=files["images"], out=files["out"].with_name("bare"), limit=5).run()
    assert bare["classes"] is None and bare["images"] == 5
    assert "label 9 has no name" in refusal(
        PrepareIdx(**(files | {"out": files["out"].with_name("c")}), classes=("a",))
    )
    with pytest.raises(Refused, match="both given"):
        PrepareIdx(**files, names="mnist", classes=("a",))
    for option in ({"names": "mnist"}, {"classes": ("a",)}, {"caption": "{}"}):
        with pytest.raises(Refused, match=f"{next(iter(option))} is given without labels"):
            PrepareIdx(images=files["images"], out=files["out"], **option)


def test_idx_files_that_are_not(files, tmp_path):
    raw = idx(DIGITS)
    bad = {
        "empty": b"",
        "text": b"hello" * 100,
        "labels": idx(LABELS),
        "short": raw[:-1],
        "long": raw + b"x",
        "floats": bytes([0, 0, 13, 3]) + raw[4:],
        "huge": raw[:4] + struct.pack(">3I", 2**31, 2**31, 2**31) + raw[16:],
        "none": raw[:4] + struct.pack(">3I", 0, 28, 28),
        "cut.gz": gzip.compress(raw)[:-20],
        "flipped.gz": gzip.compress(raw)[:50] + b"\xff" * 8 + gzip.compress(raw)[58:],
        "junk.gz": gzip.compress(raw) + b"junk",
        "crc.gz": gzip.compress(raw)[:-8] + bytes(8),
        "bomb.gz": gzip.compress(raw + bytes(10_000_000)),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
        said = refusal(PrepareIdx(**(files | {"images": tmp_path / name})))
        assert str(tmp_path / name) in said, name
        assert not name.endswith(".gz") or said.endswith("; download it again"), said
    assert "missing" in refusal(PrepareIdx(**(files | {"images": tmp_path / "missing"})))
    (tmp_path / "few").write_bytes(idx(LABELS[:7]))
    assert "7 labels for 20 images" in refusal(PrepareIdx(**(files | {"labels": tmp_path / "few"})))


@pytest.mark.skipif(not FASHION.is_dir(), reason="needs Debian's dataset-fashion-mnist (apt-get install it)")
def test_real_fashion_mnist(tmp_path, cpu, plan_for):
    images, labels = FASHION / "t10k-images-idx3-ubyte.gz", FASHION / "t10k-labels-idx1-ubyte.gz"
    config = PrepareIdx(images=images, labels=labels, out=tmp_path / "out", names="fashion-mnist", limit=2000)
    assert config.run()["classes"] == GARMENTS
    dataset = Shards(shards=tmp_path / "out", size=32, pad=2, channels=1).open(cpu, require_captions=True)
    samples = np.random.default_rng(0).permutation(2000)
    batch = dataset.read(plan_for(samples))
    assert (batch.images_NHWC.numpy()[:, 2:-2, 2:-2, 0] == read_idx(images, 3)[samples]).all()
    assert (batch.labels_N.numpy() == read_idx(labels, 1)[samples]).all()
    assert set(batch.captions) >= {"a photo of a sneaker", "a photo of an ankle boot"}


PIXELS = np.random.default_rng(1).integers(0, 256, (6, 3072), dtype=np.uint8)


def cifar(folder, version, count=6):
    folder.mkdir()
    labels = [number % 10 for number in range(count)]
    for name in [f"data_batch_{number}" for number in range(1, 6)]:
        if version == "binary":
            records = b"".join(bytes([label]) + pixels.tobytes() for label, pixels in zip(labels, PIXELS))
            (folder / f"{name}.bin").write_bytes(records)
        else:  # keys as Python 2 wrote them
            content = {b"data": PIXELS, b"labels": labels, b"batch_label": b"x", b"filenames": [b"a.png"] * count}
            raw = pickle.dumps(content, protocol=2)
            (folder / name).write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))  # as then
    return folder


@pytest.mark.parametrize("version", ["binary", "python"])
def test_cifar10_pixel_for_pixel(tmp_path, cpu, plan_for, version):
    summary = PrepareCifar10(source=cifar(tmp_path / "c", version), out=tmp_path / "out").run()
    assert summary["images"] == 30
    dataset = Shards(shards=tmp_path / "out", size=32, resize="none").open(cpu, require_captions=True)
    batch = dataset.read(plan_for(range(30)))
    expected = np.concatenate([PIXELS.reshape(6, 3, 32, 32).transpose(0, 2, 3, 1)] * 5)
    assert (batch.images_NHWC.numpy() == expected).all() and dataset.classes == CLASSES
    assert batch.labels_N.tolist() == [0, 1, 2, 3, 4, 5] * 5 and batch.captions[0] == "a photo of an airplane"


def test_a_batch_as_python_2_wrote_it():
    """Byte strings as keys and type names, written out opcode by opcode, because Python 3 cannot pickle like this."""

    def short(text):
        return b"U" + bytes([len(text)]) + text

    pixels = PIXELS[:2].tobytes()
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + short(b"b") + b"tR"
    array += b"(K\x01K\x02M\x00\x0c\x86cnumpy\ndtype\n(" + short(b"u1") + b"K\x00K\x01tR(K\x03" + short(b"|")
    array += b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", len(pixels)) + pixels + b"tb"
    raw = b"\x80\x02}(" + short(b"data") + array + short(b"labels") + b"]K\x01aK\x02au."
    content = read_pickled_arrays(Path("data_batch_1"), raw)
    assert (content[b"data"] == PIXELS[:2]).all() and content[b"labels"] == [1, 2]


@pytest.mark.parametrize("core", ["core", "_core"])
@pytest.mark.parametrize("pixels", [PIXELS, np.asfortranarray(PIXELS)])
def test_a_batch_that_was_pickled_anew(core, pixels):
    """With pickle's protocol 5, numpy names another function of its own."""
    raw = pickle.dumps({b"data": pixels}, protocol=5)
    name = f"numpy.{core}.numeric".encode()
    raw = raw.replace(b"\x8c\x13numpy._core.numeric", b"\x8c" + bytes([len(name)]) + name)
    raw = raw[:2] + raw[11:]  # without the frame opcode, whose length is no longer right
    assert (read_pickled_arrays(Path("data_batch_1"), raw)[b"data"] == PIXELS).all()


class Buffer:
    def __init__(self, *arguments):
        self.arguments = arguments

    def __reduce__(self):
        return np._core.numeric._frombuffer, self.arguments


@pytest.mark.parametrize(
    "arguments",
    [
        (np.array([None] * 4), np.dtype("u1"), (32,), "C"),  # pointers to objects as bytes
        (bytes(8), np.dtype("O"), (1,), "C"),
        (10**15, np.dtype("u1"), (1,), "C"),
        (bytes(8), np.dtype("u1"), (10**15,), "C"),
    ],
)
def test_a_buffer_that_is_not_one_is_refused(arguments):
    with pytest.raises(Refused, match="data_batch_1: it is damaged .ValueError.; download it again"):
        read_pickled_arrays(Path("data_batch_1"), pickle.dumps({b"data": Buffer(*arguments)}))


def test_a_cut_batch_of_cifar10_is_refused_and_a_small_set_is_told(tmp_path):
    folder = cifar(tmp_path / "c", "binary")
    summary = PrepareCifar10(source=folder, out=tmp_path / "small").run()
    assert summary["short"] == [f"data_batch_{number}: 6 of 10,000 images" for number in range(1, 6)]
    cut = folder / "data_batch_3.bin"
    cut.write_bytes(cut.read_bytes()[: 4 * 3073])
    message = refusal(PrepareCifar10(source=folder, out=tmp_path / "out"))
    assert message == f"{folder}: data_batch_3 holds 4 images and data_batch_1 6; download it again"


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", ["top", "value", "labels"])
def test_a_pickle_with_a_payload_is_refused_unrun(tmp_path, place):
    folder, touched = cifar(tmp_path / "c", "python"), tmp_path / "touched"
    content = {b"data": PIXELS, b"labels": [0] * 6}
    content = Payload(touched) if place == "top" else content | {f"{place}".encode(): Payload(touched)}
    (folder / "data_batch_3").write_bytes(pickle.dumps(content))
    said = refusal(PrepareCifar10(source=folder, out=tmp_path / "out"))
    assert said.startswith(f"{folder / 'data_batch_3'}: the pickle asks for") and "mkdir" in said
    assert not touched.exists()


def test_cifar10_files_that_are_not(tmp_path):
    assert "no such folder" in refusal(PrepareCifar10(source=tmp_path / "c", out=tmp_path / "out"))
    (tmp_path / "c.tar.gz").touch()
    packed = refusal(PrepareCifar10(source=tmp_path / "c.tar.gz", out=tmp_path / "out"))
    assert packed.endswith(f"it is a file; unpack it (`tar xzf {tmp_path}/c.tar.gz`) and give the folder")
    folder = cifar(tmp_path / "c", "python")
    config = PrepareCifar10(source=folder, out=tmp_path / "out")
    objects = np.array([[None] * 3072] * 6)
    contents = [{b"data": PIXELS}, {b"data": objects, b"labels": [0] * 6}, [1], {b"data": PIXELS, b"labels": [10] * 6}]
    contents += [{b"data": PIXELS, b"labels": ["x"] * 6}, {b"data": PIXELS[:, :5], b"labels": [0] * 6}]
    raws = [pickle.dumps(content) for content in contents]
    for raw in [*raws, b"", b"\x80\x04", raws[0][:-100], os.urandom(500)]:
        (folder / "data_batch_2").write_bytes(raw)
        assert "\n" not in refusal(config)
    (folder / "data_batch_2").unlink()
    assert "data_batch_2" in refusal(config)
    (folder / "data_batch_2.bin").write_bytes(b"x" * 3000)
    assert "data_batch_2.bin" in refusal(config)
