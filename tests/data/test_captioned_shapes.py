"""The embedded set: balanced, reproducible, and read back by rules that know nothing of how it was drawn."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from duotone.data import captioned_shapes
from duotone.data.captioned_shapes import COLOURS, SHAPES, Drawing, confusion, drawing_of, generate, read_back
from duotone.data.refusal import Refused
from duotone.data.shards import Shards


def test_every_caption_is_drawn_equally_often():
    drawn = [sample.captions[0] for sample in generate(360, 16)]
    captions = captioned_shapes.captions()
    assert len(set(captions)) == 120 and sorted(drawn) == sorted(captions * 3)
    assert all(drawing_of(caption).caption == caption for caption in captions)
    assert all(drawing_of(caption).colour != drawing_of(caption).background for caption in captions)


def test_a_drawing_depends_on_seed_and_number_only():
    short, long = list(generate(5, 32, seed=3)), list(generate(200, 32, seed=3))
    assert all((one.image == other.image).all() for one, other in zip(short, long))
    assert not (next(generate(1, 32, seed=4)).image == short[0].image).all()


def test_label_and_attributes_say_what_the_caption_says():
    for sample in generate(120, 16):
        drawing = drawing_of(sample.captions[0])
        assert SHAPES[sample.label] == drawing.shape
        present = {name for name, value in zip(captioned_shapes.ATTRIBUTES, sample.attributes) if value}
        assert present == {drawing.shape, drawing.colour, f"{drawing.background} background"}


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_the_checker_reads_held_out_drawings(size):
    counts = confusion(count=360, size=size)
    assert counts.accuracy("colour") == 1 and counts.accuracy("background") == 1
    assert counts.accuracy("shape") >= 0.99


@pytest.mark.parametrize("damage", ["blur", "noise", "both", "scaled"])
def test_the_checker_stands_what_a_young_model_draws(damage):
    rng, right = np.random.default_rng(0), np.zeros(3)
    for sample in generate(240, 32, seed=9):
        image = Image.fromarray(sample.image)
        if damage in ("blur", "both"):
            image = image.filter(ImageFilter.GaussianBlur(1.2))
        if damage == "scaled":
            image = image.resize((20, 20), Image.Resampling.BILINEAR).resize((32, 32), Image.Resampling.BILINEAR)
        noise = 18 * rng.standard_normal((32, 32, 3)) if damage in ("noise", "both") else 0
        shown, read = (
            drawing_of(sample.captions[0]),
            read_back(np.clip(np.asarray(image) + noise, 0, 255).astype(np.uint8)),
        )
        right += [shown.shape == read.shape, shown.colour == read.colour, shown.background == read.background]
    assert (right / 240 >= [0.95, 0.99, 0.99]).all()


def test_the_checker_does_not_see_what_is_not_there():
    for colour in ((255, 0, 0), (0, 0, 0), (128, 128, 128)):
        assert read_back(np.full((32, 32, 3), colour, np.uint8)).shape == "none"
    assert read_back(np.full((32, 32, 3), (128, 128, 128), np.uint8)).background == "none"


def test_the_checker_is_drawn_for_by_another_hand():
    """Plain Pillow drawings with textbook colours: the checker cannot lean on the generator's own outlines or palette."""
    from PIL import ImageDraw

    textbook = {"red": "red", "green": "green", "blue": "blue", "yellow": "yellow", "white": "white", "black": "black"}
    outlines = {
        "circle": lambda draw, fill: draw.ellipse((36, 36, 92, 92), fill),
        "square": lambda draw, fill: draw.rectangle((40, 40, 88, 88), fill),
        "triangle": lambda draw, fill: draw.polygon([(64, 30), (30, 90), (98, 90)], fill),
        "cross": lambda draw, fill: [draw.rectangle(box, fill) for box in ((54, 30, 74, 98), (30, 54, 98, 74))],
    }
    for shape, outline in outlines.items():
        for colour in COLOURS:
            for background in (name for name in COLOURS if name != colour):
                image = Image.new("RGB", (128, 128), textbook[background])
                outline(ImageDraw.Draw(image), textbook[colour])
                small_HWC = np.asarray(image.resize((32, 32), Image.Resampling.BOX))
                assert read_back(small_HWC) == Drawing(shape, colour, background)


def test_written_as_real_shards(tmp_path, cpu, plan_for):
    content = captioned_shapes.write(tmp_path / "s", count=130, size=32)
    dataset = Shards(shards=tmp_path / "s", size=32, resize="none").open(cpu, require_captions=True)
    assert dataset.count == content["count"] == 130 and dataset.classes == SHAPES
    batch = dataset.read(plan_for(range(130)))
    original = np.stack([sample.image for sample in generate(130, 32)])
    assert np.abs(batch.images_NHWC.numpy().astype(int) - original).mean() < 2  # JPEG
    assert all(read_back(image.numpy()).caption == caption for image, caption in zip(batch.images_NHWC, batch.captions))
    assert batch.attributes_NK.shape == (130, 16)


@pytest.mark.parametrize("size, count", [(15, 1), (129, 1), (32, 0)])
def test_nonsense_is_refused(size, count):
    with pytest.raises(Refused):
        next(generate(count, size))


def test_objects_are_large_and_whole():
    for sample in generate(240, 32, seed=1):
        image_HW3 = sample.image.astype(float)
        rim_3 = image_HW3[0].mean(axis=0)
        assert all(
            np.abs(edge - rim_3).max() < 3 for edge in (image_HW3[0], image_HW3[-1], image_HW3[:, 0], image_HW3[:, -1])
        )
        assert 0.06 < (np.linalg.norm(image_HW3 - rim_3, axis=2) > 40).mean() < 0.5


def test_jpeg_does_not_change_what_is_read():
    for sample in generate(60, 16, seed=2):
        stream = io.BytesIO()
        Image.fromarray(sample.image).save(stream, "JPEG", quality=75)
        read = read_back(np.asarray(Image.open(stream)))
        shown = drawing_of(sample.captions[0])
        assert (read.colour, read.background) == (shown.colour, shown.background)
