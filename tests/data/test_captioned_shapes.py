"""The embedded set: balanced, reproducible, and no object is cut off."""

import numpy as np
import pytest

from duotone.data import captioned_shapes
from duotone.data.captioned_shapes import SHAPES, drawing_of, generate
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine.evaluate.shape_reader import read_back


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
