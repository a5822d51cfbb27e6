"""The held-out split: complete, disjoint from training, independent of how shards are cut, refused if empty."""

import numpy as np
import pytest
import torch

from duotone.data.held_out import part_of
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.tar_index import open_index
from duotone.data.write_shards import Sample, write_shards

COUNT = 600


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same samples in one shard and in many; sample i is an image of the gray level i % 251."""
    samples = [Sample(image=np.full((8, 8, 1), n % 251, np.uint8), label=n % 3) for n in range(COUNT)]
    folders = [tmp_path_factory.mktemp(name) / "shards" for name in ("whole", "cut")]
    for folder, per_shard in zip(folders, (COUNT, 70)):
        write_shards(samples, folder, per_shard=per_shard, image_format="npy")
    return folders


def opened(folder, part, share=0.2):
    return shards_of(folder, share).open(torch.device("cpu"), part=part)


def shards_of(folder, share):
    return Shards(shards=folder, size=8, channels=1, resize="none", held_out=share)


def test_parts_are_apart_and_complete(folders):
    training, held_out, both = (opened(folders[0], part) for part in ("training", "held out", "all"))
    assert not set(training.keys) & set(held_out.keys)
    assert sorted(training.keys + held_out.keys) == sorted(both.keys) and both.count == COUNT
    assert abs(held_out.count / COUNT - 0.2) < 4 * (0.2 * 0.8 / COUNT) ** 0.5
    assert shards_of(folders[0], 0.2).held_out_keys() == held_out.keys


def test_what_is_held_out_does_not_depend_on_the_shards(folders):
    whole, cut = (opened(folder, "held out") for folder in folders)
    assert len(cut.paths) > 1 and whole.keys == cut.keys
    assert set(opened(folders[0], "held out", 0.1).keys) < set(whole.keys)


def test_a_part_reads_its_own_images(folders, plan_for):
    for folder in folders:
        for part in ("training", "held out"):
            dataset = opened(folder, part)
            batch = dataset.read(plan_for(range(dataset.count)))
            numbers = [int(key) for key in batch.keys]
            assert batch.keys == dataset.keys
            assert batch.images_NHWC[:, 0, 0, 0].tolist() == [n % 251 for n in numbers]
            assert batch.labels_N.tolist() == [n % 3 for n in numbers]


def test_bad_samples_keep_their_places(tmp_path):
    """A sample that cannot be read keeps its key, whichever side of the split it is on."""
    samples = [Sample(image=np.full((8, 8, 1), n, np.uint8)) for n in range(40)]
    write_shards(samples, tmp_path / "s", image_format="npy")
    index = open_index(next((tmp_path / "s").glob("*.tar")))
    index.bad.update({3: "no image", 11: "no image", 25: "no image"})
    names = {index.keys[n] for n in (3, 11, 25)}
    parts = [part_of(index, 0.4, part) for part in ("training", "held out")]
    assert {part.keys[place] for part in parts for place in part.bad} == names


def test_each_part_has_a_fingerprint_of_its_own(folders):
    seen = {opened(folders[0], part, share).fingerprint for part in ("training", "held out") for share in (0.2, 0.3)}
    assert len(seen) == 4
    nothing = {opened(folders[0], part, 0.0).fingerprint for part in ("training", "all")}
    assert len(nothing) == 1 and not nothing & seen


@pytest.mark.parametrize("share", [-0.1, 1.0, float("nan")])
def test_a_share_is_at_least_0_and_below_1(share):
    with pytest.raises(Refused, match="data.held_out = "):
        Shards(held_out=share)


@pytest.mark.parametrize(
    ("share", "part", "says"), [(1 - 1e-9, "training", "leaves nothing"), (0.0, "held out", "holds out")]
)
def test_a_part_without_images_is_refused(folders, share, part, says):
    with pytest.raises(Refused, match=says):
        opened(folders[0], part, share)
