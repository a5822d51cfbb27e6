"""The reader of the captioned shapes: its rules do not depend on how a picture was drawn."""

import io

import numpy as np
import pytest
from PIL import Image, ImageFilter

from duotone.data.captioned_shapes import COLOURS, Drawing, drawing_of, generate
from duotone.engine.evaluate.shape_reader import confusion, read_back


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
    """Plain Pillow drawings in textbook colours: the checker must not rely on the generator's outlines or palette."""
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


def test_jpeg_does_not_change_what_is_read():
    for sample in generate(60, 16, seed=2):
        stream = io.BytesIO()
        Image.fromarray(sample.image).save(stream, "JPEG", quality=75)
        read = read_back(np.asarray(Image.open(stream)))
        shown = drawing_of(sample.captions[0])
        assert (read.colour, read.background) == (shown.colour, shown.background)
