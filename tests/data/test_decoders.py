"""Pixels: our Pillow path against plain calls of Pillow, our DALI path against our Pillow path."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from duotone.data.batch import to_device
from duotone.data.framing import boxes, upright
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.write_shards import Sample, write_shards

KINDS = [("RGB", "JPEG", {"quality": 90}), ("RGB", "JPEG", {"progressive": True}), ("L", "JPEG", {})]
KINDS += [("CMYK", "JPEG", {}), ("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("1", "PNG", {})]
KINDS += [
    ("RGBA", "PNG", {}),
    ("LA", "PNG", {}),
    ("RGB", "WEBP", {}),
    ("RGBA", "WEBP", {}),
    ("RGB", "WEBP", {"lossless": True}),
]
EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, photos, encode):
    """Every kind of image and every orientation, each with different sides."""
    samples = []
    for number, (mode, format, options) in enumerate(KINDS):
        raw = encode(photos[number % 2][: 300 + 3 * number, : 500 - 7 * number], format, mode, **options)
        samples.append(Sample(image=raw, extension=EXTENSIONS[format], captions=[f"{mode} {format} {options}"]))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        raw = encode(photos[0][:200, : 301 + orientation], exif=exif, quality=95)
        samples.append(Sample(image=raw, extension="jpg", captions=[f"orientation {orientation}"]))
    out = tmp_path_factory.mktemp("decoders") / "shards"
    write_shards(samples, out, per_shard=8)
    return out


def read(folder, cpu, plan, decoder, **options):
    dataset = Shards(shards=folder, size=64, decoder=decoder, **options).open(cpu)
    assert dataset.decoder == decoder
    return dataset.read(plan)


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("resize, crop", [("crop", "center"), ("crop", "random"), ("squash", "center")])
def test_dali_agrees_with_pillow(folder, cpu, plan_for, channels, resize, crop):
    """With the same rectangle and filter, every image is within 1 level of 255 on average, and within 24 everywhere."""
    pytest.importorskip("nvidia.dali")
    count = len(KINDS) + 8
    plan = plan_for(range(count), crops=np.random.default_rng(0).random((count, 2)))
    options = {"channels": channels, "resize": resize, "crop": crop, "pad": 3}
    ours, theirs = (read(folder, cpu, plan, decoder, **options) for decoder in ("pillow", "dali"))
    difference_NHWC = np.abs(ours.images_NHWC.numpy().astype(int) - theirs.images_NHWC.numpy())
    for caption, difference_HWC in zip(ours.captions, difference_NHWC):
        assert difference_HWC.mean() < 1 and difference_HWC.max() <= 24, caption


@pytest.mark.parametrize("crops", [(0.0, 0.0), (0.999, 0.999), (0.3, 0.7)])
def test_the_crop_is_where_the_plan_says(folder, cpu, plan_for, crops):
    """Against plain calls of Pillow: turn the whole picture, cut the square, resize it."""
    count = len(KINDS) + 8
    batch = read(folder, cpu, plan_for(range(count), crops=[crops] * count), "pillow", crop="random")
    dataset = Shards(shards=folder).open(cpu)
    for sample, ours_HWC in enumerate(batch.images_NHWC.numpy()):
        image = Image.open(io.BytesIO(dataset._bytes.image(sample).tobytes()))
        image = ImageOps.exif_transpose(image).convert("RGB")
        side = min(image.size)
        top, left = (int(share * (length - side + 1)) for share, length in zip(crops, image.size[::-1]))
        plain_HWC = image.crop((left, top, left + side, top + side)).resize((64, 64), Image.Resampling.BICUBIC)
        difference_HWC = np.abs(ours_HWC.astype(int) - np.asarray(plain_HWC))
        assert difference_HWC.mean() < 1.5, batch.captions[sample]  # one of the filters sees past the crop's rim


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turning_a_square_is_turning_the_picture(orientation):
    stored_HW = np.arange(35).reshape(5, 7).astype(np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    Image.fromarray(stored_HW).save(stream, "PNG", exif=exif)
    whole_HW = np.asarray(ImageOps.exif_transpose(Image.open(stream)))
    for share in np.linspace(0, 0.999, 12):
        crops_N2 = np.array([[share, share]])
        ((top, left, height, width),) = boxes(np.array([[5, 7]]), np.array([orientation]), crops_N2, "crop").tolist()
        square_HW = upright(stored_HW[top : top + height, left : left + width, None], orientation)[:, :, 0]
        y, x = (int(share * (length - 5 + 1)) for length in whole_HW.shape)
        assert (square_HW == whole_HW[y : y + 5, x : x + 5]).all()


def test_boxes_stay_inside():
    rng = np.random.default_rng(0)
    sides_N2, orientations_N = rng.integers(1, 50, (5000, 2)), rng.integers(1, 9, 5000)
    crops_N2 = np.where(rng.random((5000, 2)) < 0.1, np.nextafter(1, 0), rng.random((5000, 2)))
    for crops in (crops_N2, None):
        boxes_N4 = boxes(sides_N2, orientations_N, crops, "crop")
        assert (boxes_N4[:, :2] >= 0).all() and (boxes_N4[:, :2] + boxes_N4[:, 2:] <= sides_N2).all()
        assert (boxes_N4[:, 2] == sides_N2.min(axis=1)).all() and (boxes_N4[:, 3] == boxes_N4[:, 2]).all()


def test_random_crops_reach_both_ends():
    crops_N2 = np.random.default_rng(0).random((2000, 2))
    boxes_N4 = boxes(np.full((2000, 2), [10, 13]), np.ones(2000, int), crops_N2, "crop")
    assert sorted(set(boxes_N4[:, 1].tolist())) == [0, 1, 2, 3] and set(boxes_N4[:, 0].tolist()) == {0}


@pytest.mark.parametrize("decoder", ["pillow", "dali"])
def test_images_at_their_size_are_not_resampled(tmp_path, cpu, plan_for, photos, decoder):
    if decoder == "dali":
        pytest.importorskip("nvidia.dali")
    write_shards([Sample(image=photos[0][:64, :90])], tmp_path / "s", image_format="png")
    batch = read(tmp_path / "s", cpu, plan_for([0], crops=[[0, 0.5]]), decoder, crop="random")
    assert (batch.images_NHWC[0].numpy() == photos[0][:64, 13 : 13 + 64]).all()


@pytest.mark.parametrize("on_bad", ["refuse", "replace"])
def test_what_dali_lacks_is_no_pictures_fault(folder, cpu, plan_for, monkeypatch, on_bad):
    """An out-of-memory error is raised as it is, and reading works later; if DALI can decode nothing, one line says so."""
    dali = pytest.importorskip("duotone.data.dali")
    dataset = Shards(shards=folder, size=64, decoder="dali", on_bad=on_bad).open(cpu)
    real, calls = dali.DaliDecoder._run, []

    def short(self, *arguments):
        calls.append(1)
        if len(calls) <= 2:
            raise RuntimeError("Critical error in pipeline: CUDA allocation failed: out of memory")
        return real(self, *arguments)

    monkeypatch.setattr(dali.DaliDecoder, "_run", short)
    with pytest.raises(RuntimeError, match="out of memory"):
        dataset.read(plan_for([0, 1]))
    calls += [1]
    assert dataset.read(plan_for([0, 1])).skipped == [] and dataset.unread() == []

    def broken(self, count):
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(dali.DaliDecoder, "_build", broken)
    dataset._squares.decoder.pipeline = None
    with pytest.raises(Refused, match="decode nothing here .*insufficient.*--data.decoder pillow"):
        dataset.read(plan_for([0, 1]))
    assert dataset.unread() == []


@pytest.mark.gpu
def test_a_batch_is_sent_without_waiting_for_the_device():
    """Even after a long calculation; and writing to the CPU's memory afterwards does not change what arrives."""
    images_NHWC = torch.ones(64, 128, 128, 3, dtype=torch.uint8)
    to_device(images_NHWC, "cuda")  # the first call allocates memory
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)
    began = torch.cuda.current_stream().record_event()
    there = to_device(images_NHWC, "cuda")
    assert not began.query(), "it came back while the device was busy"
    images_NHWC.zero_()
    assert there.sum().item() == there.numel()


@pytest.mark.gpu
@pytest.mark.parametrize("channels", [3, 1])
def test_dali_on_the_gpu_agrees_with_pillow(folder, cpu, plan_for, channels):
    """Within 3 levels on average, as nvJPEG rounds and upsamples colour in its own way."""
    pytest.importorskip("nvidia.dali")
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    plan = plan_for(range(len(KINDS) + 8))
    ours = read(folder, cpu, plan, "pillow", channels=channels, pad=3)
    theirs = read(folder, torch.device("cuda"), plan, "dali", channels=channels, pad=3)
    assert theirs.images_NHWC.is_cuda
    difference_NHWC = np.abs(ours.images_NHWC.numpy().astype(int) - theirs.images_NHWC.cpu().numpy())
    for caption, difference_HWC in zip(ours.captions, difference_NHWC):
        assert difference_HWC.mean() < 3, caption
