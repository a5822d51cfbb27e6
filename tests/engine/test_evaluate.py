"""Metrics against closed forms and brute force; a classifier and whole evaluations on real photographs of clothes."""

import importlib.util
import json
import math
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from duotone.data import captioned_shapes
from duotone.data.prepare.idx import GARMENTS, PrepareIdx
from duotone.data.prepare.image_folder import PrepareFolder
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.tar_index import open_index, save_index
from duotone.data.write_shards import Sample, write_shards
from duotone.engine import artifact, cli
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.evaluate import evaluation, features, images, report
from duotone.engine.evaluate import loss_table as loss_table_module
from duotone.engine.evaluate.classifier import ClassifierConfig, augmented, judge_of, shares
from duotone.engine.evaluate.composition import composition
from duotone.engine.evaluate.distances import (
    Statistics,
    frechet,
    frechet_terms,
    kernel_distance,
    precision_recall,
)
from duotone.engine.evaluate.evaluation import distances_of
from duotone.engine.evaluate.features import FeaturesConfig, RealFeatures, choose, real_features
from duotone.engine.evaluate.images import Images, Splits, read_images, read_splits, spread
from duotone.engine.evaluate.loss_table import cells, loss_table
from duotone.engine.evaluate.nearest import nearest, pairs
from duotone.engine.evaluate.shares import Share, student
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.edm import EDM
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.speed import Speed
from duotone.engine.train import train

FASHION = Path("/usr/share/datasets/fashion-mnist")
CPU = torch.device("cpu")
SMALL = ["--classifier.width", "16", "--classifier.epochs", "1", "--loss-images", "20", "--loss-levels", "2"]
QUICK = ["--samples", "40", "--steps", "2", "--sampler", "euler", *SMALL]


# ----------------------------------------------------------------------------------------------- closed forms


def normals(count: int, mean, covariance, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).multivariate_normal(mean, covariance, count)


def statistics(mean, covariance) -> Statistics:
    return Statistics(mean_D=np.array(mean, float), covariance_DD=np.array(covariance, float), count=1000)


def test_frechet_of_gaussians_whose_covariances_commute():
    """|mu|^2 + sum of (sqrt(a) - sqrt(b))^2 over the eigenvalues, Dowson and Landau 1982."""
    turn, _ = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))
    a, b = np.array([4.0, 1.0, 0.25]), np.array([1.0, 9.0, 0.0])
    x = statistics([1, 0, 2], turn @ np.diag(a) @ turn.T)
    y = statistics([0, 2, 2], turn @ np.diag(b) @ turn.T)
    assert frechet(x, y) == pytest.approx(5 + np.square(np.sqrt(a) - np.sqrt(b)).sum(), abs=1e-6)
    # An eigenvalue of zero is accurate to 1e-16, its root to 1e-8.
    assert frechet(y, x) == pytest.approx(frechet(x, y), abs=1e-6) and frechet(x, x) == pytest.approx(0, abs=1e-6)


def test_composition_tells_shifted_means_from_narrow_classes():
    random, labels_N = np.random.default_rng(0), np.arange(4000) % 2
    noise_ND = random.standard_normal((4000, 3))
    centres_ND = np.array([[0.0, 0, 0], [6, 0, 0]])[labels_N]
    real_ND = centres_ND + noise_ND

    def of(x_ND):
        return composition(x_ND, labels_N, real_ND, labels_N, ("left", "right"))

    shifted, narrow = of(real_ND + 1), of(centres_ND + 0.5 * noise_ND)
    assert shifted.whole.means == pytest.approx(3) == shifted.whole.frechet and shifted.within == pytest.approx(1)
    assert narrow.within == pytest.approx(0.25, rel=0.01) == narrow.by_class["left"].spread
    assert narrow.between == pytest.approx(1, rel=0.01) and narrow.whole.means == pytest.approx(0, abs=0.01)
    assert narrow.by_class["right"].frechet == pytest.approx(3 * 0.25, rel=0.05)
    assert of(real_ND + 3 * centres_ND / 6).between == pytest.approx((9 / 6) ** 2, rel=0.02)
    x, y = Statistics.of(real_ND), Statistics.of(centres_ND)
    assert sum(frechet_terms(x, y)) == frechet(x, y)


def test_frechet_is_that_of_a_general_matrix_root():
    from scipy.linalg import sqrtm

    x, y = (Statistics.of(np.random.default_rng(s).normal(size=(50, 8)) @ np.diag(range(1, 9))) for s in (1, 2))
    root = sqrtm(x.covariance_DD @ y.covariance_DD).real
    apart = np.square(x.mean_D - y.mean_D).sum()
    assert frechet(x, y) == pytest.approx(apart + np.trace(x.covariance_DD + y.covariance_DD - 2 * root), rel=1e-9)


def test_frechet_stands_singular_covariances():
    """With fewer vectors than dimensions, rounding makes eigenvalues of -1e-17, whose roots must not become NaN."""
    x_ND = np.random.default_rng(0).normal(size=(5, 64))
    assert frechet(Statistics.of(x_ND), Statistics.of(x_ND + 3)) == pytest.approx(9 * 64, rel=1e-6)


def test_kernel_distance_is_the_double_sum():
    x_ND, y_MD = normals(7, [0, 0], np.eye(2)), normals(9, [1, 0], np.eye(2), seed=1)

    def k(a, b):
        return (a @ b / 2 + 1) ** 3

    of_x = np.mean([k(a, b) for i, a in enumerate(x_ND) for j, b in enumerate(x_ND) if i != j])
    of_y = np.mean([k(a, b) for i, a in enumerate(y_MD) for j, b in enumerate(y_MD) if i != j])
    across = np.mean([k(a, b) for a in x_ND for b in y_MD])
    assert kernel_distance(x_ND, y_MD) == pytest.approx(of_x + of_y - 2 * across, abs=1e-12)


def test_kernel_distance_is_unbiased():
    """In one dimension, E[k] has a closed form in the moments; for equal distributions the mean over draws is zero."""
    found = [kernel_distance(normals(20, [0], [[1]], s), normals(20, [0], [[1]], 1000 + s)) for s in range(400)]
    assert abs(np.mean(found)) < 3 * np.std(found) / 20
    # (1 + xy)^3 with x, y ~ N(m, 1) and N(n, 1): moments 1, m, m^2 + 1, m^3 + 3 m.
    first, second = [1, 0, 1, 0], [1, 1, 2, 4]
    mean = sum(c * (p * p + q * q - 2 * p * q) for c, p, q in zip([1, 3, 3, 1], first, second))
    found = [kernel_distance(normals(50, [0], [[1]], s), normals(50, [1], [[1]], 500 + s)) for s in range(200)]
    assert np.mean(found) == pytest.approx(mean, abs=4 * np.std(found) / 200**0.5)


def test_precision_and_recall_are_those_of_the_definition():
    real, made = normals(30, [0, 0], np.eye(2)), normals(25, [1, 0], np.eye(2), seed=1)

    def inside(x, y):
        radii = [sorted(np.linalg.norm(y - b, axis=1))[3] for b in y]
        return np.mean([any(np.linalg.norm(a - b) <= r for b, r in zip(y, radii)) for a in x])

    assert precision_recall(real, made) == pytest.approx((inside(made, real), inside(real, made)))


def test_a_collapsed_model_is_precise_and_recalls_nothing():
    real = normals(200, [0, 0], np.eye(2))
    precision, recall = precision_recall(real, real[:1] + normals(200, [0, 0], 1e-6 * np.eye(2), seed=1))
    assert precision > 0.9 and recall < 0.05
    assert precision_recall(real, real + 100) == (0, 0) and precision_recall(real, real) == (1, 1)


@pytest.mark.parametrize(("right", "trials", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634)])
def test_wilson_interval(right, trials, low, high):
    assert Share(right, trials).interval == pytest.approx((low, high), abs=1e-4)


def test_answers_of_one_image_are_no_trials_of_their_own():
    """The interval of forty attributes of ten faces is that of ten trials."""
    share = Share.of(np.ones(400, bool), independent=10)
    assert share.value == 1 and share.interval == Share(10, 10).interval != Share(400, 400).interval
    assert Share.from_json(json.loads(json.dumps(share.to_json()))) == share


def test_the_quantile_of_student():
    from scipy.stats import t

    assert student(9) is None
    for trials in (10, 11, 30, 512):
        assert student(trials) == pytest.approx(t.ppf(0.975, trials - 1), abs=2e-3)


def test_copies_are_found_where_the_data_has_twins():
    """Twins have distance 0: taken as the scale, they would let nothing count as a copy."""
    train_MD = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
    train_MD[:20] = train_MD[20:40]
    assert nearest(train_MD[:100], train_MD).closer == 1
    assert nearest(np.ones((5, 4)) + 3 * np.eye(5, 4), train_MD).closer < 1
    assert nearest(train_MD[:2], np.repeat(train_MD[:1], 5, axis=0)).closer == 0.5


def test_any_beginning_of_the_order_holds_every_class():
    labels_N = np.array([0] * 70 + [1] * 20 + [2] * 10)
    assert np.bincount(labels_N[spread(labels_N)[:50]]).tolist() == [35, 10, 5]


def test_unknown_attributes_do_not_count():
    logits_NK, wanted_NK = np.array([[1.0, -1.0], [1.0, 1.0]]), np.array([[1, 0], [0, -1]])
    whole, by_name = shares(logits_NK, wanted_NK, ("a", "b"))
    assert (whole.right, whole.trials) == (2, 3) and by_name["b"] == Share(1, 1)


# -------------------------------------------------------------------------------------------------- memorisation


def test_planted_copies_are_found():
    random = np.random.default_rng(0)
    train_NHWC = random.integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    fresh_NHWC = random.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    planted_NHWC = np.concatenate([train_NHWC[[7, 19, 280]], fresh_NHWC])
    found = nearest(planted_NHWC, train_NHWC)
    assert found.places_N[:3].tolist() == [7, 19, 280] and found.distances_N[:3].tolist() == [0, 0, 0]
    assert sorted(found.closest(3).tolist()) == [0, 1, 2]
    assert 3 / 43 <= found.closer < 6 / 43
    sheet, columns = pairs(planted_NHWC, train_NHWC, found, columns=3, rows=1)
    assert columns == 3 and np.array_equal(sheet[:3], sheet[3:])


@pytest.mark.parametrize("at_once", [10**6, 70], ids=["at once", "in blocks"])
def test_the_nearest_is_that_of_brute_force(at_once, monkeypatch):
    monkeypatch.setattr("duotone.engine.evaluate.nearest.BYTES", 4 * 5 * at_once)
    x_ND, y_MD = normals(20, [0] * 5, np.eye(5)), normals(300, [0] * 5, np.eye(5), seed=1)
    apart_NM = np.linalg.norm(x_ND[:, None] - y_MD[None], axis=2)
    found = nearest(x_ND, y_MD)
    assert found.places_N.tolist() == apart_NM.argmin(1).tolist()
    assert found.distances_N == pytest.approx(apart_NM.min(1), rel=1e-5)
    own_MM = np.linalg.norm(y_MD[:, None] - y_MD[None], axis=2) + np.diag([np.inf] * 300)
    assert found.threshold == pytest.approx(np.quantile(own_MM.min(1), 0.01), rel=1e-5)


def test_precision_of_samples_and_of_real_images_is_of_as_many():
    """Both depend on the number of images, and the floor's column must be comparable."""
    images = Images(images_NHWC=np.zeros((300, 1, 1, 1), np.uint8), fingerprint="")
    splits = Splits(train=images, held_out=images, held_out_is="test", seen=images)
    parts = {name: normals(300, [0] * 4, np.eye(4), seed) for seed, name in enumerate(splits.parts)}
    real = RealFeatures(parts=parts, seen_ND=parts["train"])
    made_ND = normals(60, [0] * 4, np.eye(4), seed=9)
    found = distances_of(made_ND, real, splits, floor=200)["train"]
    train_ND, held_out_ND = parts["train"][:60], parts["held_out"][:60]
    assert (found.samples.precision, found.samples.recall) == precision_recall(train_ND, made_ND)
    assert (found.real.precision, found.real.recall) == precision_recall(train_ND, held_out_ND)


def test_what_is_stored_of_pictures_is_of_how_they_are_turned(tmp_path):
    """If reading orientations is corrected, the same files give other pixels, so the fingerprint must change."""
    exif, prints = Image.Exif(), []
    exif[0x0112] = 6
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "pictures" / "a.jpg", exif=exif)
    PrepareFolder(images=tmp_path / "pictures", out=tmp_path / "out").run()
    for orientation in (6, 1):
        index = open_index(tmp_path / "out" / "00000.tar")
        index.columns["orientation"][:] = orientation
        save_index(tmp_path / "out" / "00000.tar", index)
        prints.append(read_images(Shards(shards=tmp_path / "out", size=16), 1, "set").fingerprint)
    assert prints[0] != prints[1]


# ------------------------------------------------------------------------------------------- photographs of clothes


def prepared(out: Path, split: str, limit: int) -> Path:
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    images, labels = (FASHION / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=out, limit=limit).run()
    return out


@pytest.fixture(scope="module")
def clothes(tmp_path_factory) -> Path:
    """2,000 training images, and inside their folder another with 400 images of the test set."""
    folder = tmp_path_factory.mktemp("clothes") / "shards"
    prepared(folder, "train", 2000)
    prepared(folder / "test", "t10k", 400)
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


FRAME = Shards(size=28, channels=1, resize="none", threads=1)
TINY = UNetConfig(
    channels=(8, 8),
    attention=("none", "none"),
    middle="absent",
    heads=(1, 1),
    blocks=(1, 1),
    depth=(1, 1),
    groups=4,
    in_channels=1,
    out_channels=1,
)


@pytest.fixture(scope="module")
def run(clothes, tmp_path_factory) -> Path:
    """A real run of four steps."""
    recipe = Recipe(
        name="clothes",
        data=replace(FRAME, shards=clothes),
        conditioning=(Label(dropout=0.2),),
        objective=EDM(sigma_data=0.7),
        model=TINY,
        batch_size=8,
        images=32,
        preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
        log=Log(every=1),
        speed=Speed(threads=1),
        out=tmp_path_factory.mktemp("runs") / "clothes",
    )
    return train(recipe)


def untrained(path: Path, conditioning, facts: Facts, **changed) -> Path:
    """A file with a model as at the start of a run."""
    recipe = replace(
        Recipe(name="untrained", data=FRAME, conditioning=conditioning, objective=EDM(sigma_data=0.7), model=TINY),
        **changed,
    )
    torch.manual_seed(0)
    artifact.save(path, dict(artifact.build(recipe, facts).named_parameters()), recipe, facts, 0)
    return path


def test_a_classifier_learns_real_clothes(clothes, cache):
    splits = read_splits(replace(FRAME, shards=clothes), None, 60_000)
    assert (len(splits.train), len(splits.held_out), splits.held_out_is) == (2000, 400, "test")
    judge = judge_of(splits, ClassifierConfig(epochs=4, width=32), cache, CPU)
    assert judge.accuracy.value > 0.7 and judge.names == tuple(GARMENTS)
    assert sum(share.trials for share in judge.by_name.values()) == 400
    assert judge.features(splits.held_out.images_NHWC[:3]).shape == (3, 32)


def test_a_second_call_does_not_train_again(clothes, tmp_path, monkeypatch, capsys):
    splits = read_splits(replace(FRAME, shards=clothes), None, 400)
    config = ClassifierConfig(epochs=1, width=8)
    first = judge_of(splits, config, tmp_path, CPU)
    real = real_features(choose(FeaturesConfig(), first, CPU), splits, tmp_path)
    monkeypatch.setattr("duotone.engine.evaluate.classifier.train", None)
    monkeypatch.setattr("duotone.engine.evaluate.features.made", None)
    again = judge_of(splits, config, tmp_path, CPU)
    assert again.accuracy == first.accuracy and again.by_name == first.by_name
    same = real_features(choose(FeaturesConfig(), again, CPU), splits, tmp_path)
    assert np.array_equal(same.train_ND, real.train_ND)
    assert np.array_equal(again.logits(splits.train.images_NHWC), first.logits(splits.train.images_NHWC))
    with pytest.raises(TypeError):  # other settings mean another classifier, which would have to be trained
        judge_of(splits, replace(config, seed=1), tmp_path, CPU)


def test_a_damaged_cache_is_made_again(clothes, tmp_path, capsys):
    splits = read_splits(replace(FRAME, shards=clothes), None, 200)
    config = ClassifierConfig(epochs=1, width=8)
    folder = judge_of(splits, config, tmp_path, CPU).folder
    judge = judge_of(splits, config, tmp_path, CPU)
    network = choose(FeaturesConfig(), judge, CPU)
    made = real_features(network, splits, tmp_path)
    (features,) = tmp_path.glob("features-*")
    features.write_bytes(b"cut off")
    assert np.array_equal(real_features(network, splits, tmp_path).train_ND, made.train_ND)
    assert "computing the features again" in capsys.readouterr().out
    (folder / "classifier.safetensors").write_bytes(b"cut off")
    judge_of(splits, config, tmp_path, CPU)
    assert "training the classifier again" in capsys.readouterr().out
    for torn in ("{}", "[]", '{"accuracy": 1, "by_name": {}}'):
        (folder / "classifier.json").write_text(torn)
        assert judge_of(splits, config, tmp_path, CPU).accuracy.trials == 200
        assert "training the classifier again" in capsys.readouterr().out


def test_features_belong_to_the_weights_that_made_them(clothes, tmp_path):
    """Trained elsewhere on the same data with the same settings, a classifier is another network."""
    splits = read_splits(replace(FRAME, shards=clothes), None, 200)
    judge = judge_of(splits, ClassifierConfig(epochs=1, width=8), tmp_path, CPU)
    weights = judge.folder / "classifier.safetensors"
    save_file({name: value + 0.1 for name, value in load_file(weights).items()}, weights)
    other = judge_of(splits, ClassifierConfig(epochs=1, width=8), tmp_path, CPU)
    assert choose(FeaturesConfig(), judge, CPU).key != choose(FeaturesConfig(), other, CPU).key


def test_augmentation_moves_and_mirrors_and_keeps_the_shape():
    x_NCHW = torch.arange(32.0).view(2, 1, 4, 4)
    still = augmented(x_NCHW, ClassifierConfig(flip=False, shift=0), torch.Generator())
    assert torch.equal(still, x_NCHW)
    moved = augmented(x_NCHW, ClassifierConfig(), torch.Generator().manual_seed(0))
    assert moved.shape == x_NCHW.shape and not torch.equal(moved, x_NCHW)


def test_without_a_test_set_a_tenth_is_held_out(clothes):
    apart = replace(FRAME, shards=clothes / "test")
    splits = read_splits(apart, None, 60_000)
    assert (len(splits.train), len(splits.held_out), len(splits.seen)) == (360, 40, 400)
    assert "seen in training" in splits.held_out_is


def test_held_out_images_stand_beside_a_test_set_or_in_its_place(clothes):
    held_out = replace(FRAME, shards=clothes, held_out=0.2)
    splits = read_splits(held_out, None, 60_000)
    assert list(splits.parts) == ["train", "validation", "held_out"] and splits.held_out_is == "test"
    assert len(splits.train) + len(splits.validation) == 2000 and 340 < len(splits.validation) < 460
    rows = {image.tobytes() for image in splits.train.images_NHWC}
    assert sum(image.tobytes() in rows for image in splits.validation.images_NHWC) <= 2  # the data has a few twice
    alone = read_splits(replace(FRAME, shards=clothes / "test", held_out=0.2), None, 60_000)
    assert list(alone.parts) == ["train", "held_out"] and alone.held_out_is == "validation" and alone.is_apart
    assert len(alone.train) + len(alone.held_out) == 400 and len(alone.train) == len(alone.seen)


def evaluated(run: Path, cache: Path, out: Path, *flags: str) -> dict:
    cli.main(["evaluate", str(run), "--cache", str(cache), "--out", str(out), "--data.threads", "1", *QUICK, *flags])
    return json.loads((out / "evaluation.json").read_text())


def test_a_trained_run_is_measured_end_to_end(run, cache, tmp_path, capsys):
    """Without --data.shards, the run's own folder says what it was trained on."""
    found = evaluated(run, cache, tmp_path / "out", "--json", str(tmp_path / "copy.json"))
    said = capsys.readouterr().out
    assert found == json.loads((tmp_path / "copy.json").read_text())
    assert found["data"]["held_out_is"] == "test" and found["trained_images"] == 32
    for reference in ("train", "held_out"):
        against = found["distances"][reference]
        assert against["samples"]["frechet"] > against["real"]["frechet"] > 0
        assert 0 <= against["samples"]["precision"] <= 1
    assert found["accuracy"]["trials"] == 40 and set(found["accuracy_by_name"]) == set(GARMENTS)
    assert [row["name"] for row in found["losses"][:2]] == ["all", "t-shirt"]
    assert found["nearest"]["pixels"]["closer_real"] is not None
    assert {p.name for p in (tmp_path / "out").glob("*.png")} == {
        "samples.png",
        "nearest-pixels.png",
        "nearest-features.png",
    }
    for line in ("features: the data's own classifier", "Frechet distance", "precision", "ankle boot", "loss at sigma"):
        assert line in said
    assert str(tmp_path) not in json.dumps(found)


def test_samples_are_drawn_as_the_sample_command_would(run, cache, tmp_path, monkeypatch):
    real, seen = evaluation.sample, []
    monkeypatch.setattr(evaluation, "sample", lambda *given, **asked: seen.append(asked) or real(*given, **asked))
    steered = ("--guidance", "1.5", "--interval", "1", "inf", "--rescale", "0.5", "--spacing", "log-linear")
    found = evaluated(run, cache, tmp_path / "out", *steered)
    assert found["forwards_per_sample"] == 3, "of the two steps, from sigma 80 and 0.4, the first is guided"
    assert found["settings"]["interval"] == [1.0, None] and found["settings"]["rule"] == "plain"
    assert "--interval 1.0 inf --rescale 0.5 --spacing log-linear" in found["command"]
    assert "Infinity" not in (tmp_path / "out" / "evaluation.json").read_text(), "which is no JSON"
    for asked in seen:
        assert (asked["guidance"], asked["rescale"], asked["spacing"], asked["clip"]) == (1.5, 0.5, "log-linear", None)
        assert (asked["interval"], asked["rule"], asked["seed"]) == ((1.0, math.inf), None, 1)
    assert seen


def test_guidance_of_a_model_without_conditions_is_refused(clothes, tmp_path, cache, capsys):
    path = untrained(tmp_path / "m.safetensors", (), Facts(), model=TINY)
    flags = ("--data.shards", str(clothes), "--cache", str(cache), "--out", str(tmp_path / "out"), *QUICK)
    said = refused(capsys, str(path), *flags, "--guidance", "2", "--interval", "0.3", "1")
    assert "guidance needs a condition" in said and not (tmp_path / "out").exists()
    cli.main(["evaluate", str(path), *flags])
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["settings"]["guidance"] == 1


def test_a_run_that_held_images_out_is_measured_against_three_sets(clothes, cache, tmp_path, capsys):
    """The split is in the run's folder, none of its keys was ever read, and the floor may use fewer real images."""
    recipe = Recipe(
        name="held_out",
        data=replace(FRAME, shards=clothes, held_out=0.2),
        objective=EDM(sigma_data=0.7),
        model=TINY,
        batch_size=400,
        images=2000,
        preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
        log=Log(every=1, trace=True),
        speed=Speed(threads=1),
        out=tmp_path / "run",
    )
    folder = train(recipe)
    split = json.loads((folder / "splits.json").read_text())
    rows = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
    keys = [key for row in rows for key in row["keys"]]
    assert split["training"] + len(split["held_out"]) == 2000 and len(set(keys)) == split["training"]
    assert not set(keys) & set(split["held_out"])
    assert "20.00% of the data held out" in (folder / "MODEL_CARD.md").read_text()
    found = evaluated(folder, cache, tmp_path / "out", "--floor", "30")
    assert list(found["distances"]) == ["train", "validation", "held_out"]
    assert found["data"]["validation"] == len(split["held_out"]) and "--floor 30" in found["command"]
    said = capsys.readouterr().out
    assert "from the validation set" in said and "(real: 30 of the test set)" in said
    elsewhere = split | {"held_out": ["renamed", *split["held_out"]]}
    (folder / "splits.json").write_text(json.dumps(elsewhere))
    said = refused(capsys, str(folder), "--cache", str(cache), "--out", str(tmp_path / "out"), *QUICK)
    assert "1 of them are not held out of" in said and "(such as 'renamed')" in said and said.count("\n") == 1
    (folder / "splits.json").write_text("[]")
    assert "cannot be read (TypeError)" in refused(capsys, str(folder), "--cache", str(cache), *QUICK)


def test_what_was_trained_on_is_no_test_set(run, clothes, cache, tmp_path, capsys):
    said = refused(capsys, str(run), "--cache", str(cache), "--out", str(tmp_path), *QUICK, "--test", str(clothes))
    assert f"{clothes} holds what the model was trained on, and is no test set" in said and said.count("\n") == 1


def test_a_test_set_without_labels_beside_labelled_images_is_refused(clothes):
    splits = read_splits(replace(FRAME, shards=clothes), None, 40)
    train, bare = replace(splits.train, classes=None), replace(splits.held_out, classes=None, labels_N=None)
    with pytest.raises(Refused, match="of here and there only here has labels"):
        images.refuse_unlike_sets(Path("here"), train, Path("there"), bare)


def test_a_class_called_all_leaves_the_whole_alone(clothes):
    splits = read_splits(replace(FRAME, shards=clothes), None, 400)
    named = replace(splits.held_out, classes=("trouser", "all", *GARMENTS[2:]))
    whole, *classes = cells(1.0, np.ones(len(named)), named)
    assert whole.name == "all" and whole.images == 400
    assert [cell.name for cell in classes[:2]] == ["trouser", "all (class)"]
    half = Share(right=20, trials=40)
    judge = SimpleNamespace(accuracy=Share(right=30, trials=400), by_name={"trouser": half, "all": half})
    result = SimpleNamespace(judged_by="labels", asked_by="labels", accuracy=Share(7, 40), judge=judge)
    result.by_name = {"trouser": half, "all": half}
    lines = report.accuracy_lines(result, splits)
    assert [line.split()[:2] for line in lines[1:]] == [["all", "17.5%"], ["trouser", "50.0%"], ["all", "50.0%"]]


def test_the_search_for_copies_says_what_it_has_not_looked_at(clothes):
    for most, said in ((400, "among 400 of 2,000 training images: --most"), (2000, "nothing is copied)")):
        splits = read_splits(replace(FRAME, shards=clothes), None, most)
        assert said in report.copy_lines(SimpleNamespace(copies={}), splits)[0]


def test_a_checkpoint_is_measured_and_its_result_outlives_it(run, cache, tmp_path):
    """The result goes beside the run's own, since a checkpoint is removed with its content; the data is the run's."""
    (checkpoint,) = (run / "checkpoints").iterdir()
    cli.main(["evaluate", str(checkpoint), "--cache", str(cache), "--data.threads", "1", *QUICK])
    found = json.loads((run / f"evaluation-{checkpoint.name}" / "evaluation.json").read_text())
    assert found["trained_images"] == 32 and not list(checkpoint.glob("*.png"))
    assert "--classifier.width 16 --classifier.epochs 1 --loss-images 20 --loss-levels 2" in found["command"]


def test_measuring_again_gives_the_same_and_trains_nothing(run, cache, tmp_path, monkeypatch):
    first = evaluated(run, cache, tmp_path / "first")
    monkeypatch.setattr("duotone.engine.evaluate.classifier.train", None)
    assert evaluated(run, cache, tmp_path / "second") == first


def test_samples_that_are_training_images_are_reported(run, clothes, cache, tmp_path, monkeypatch):
    """For a model that has memorised its data, the distances are excellent, and the check says why."""
    monkeypatch.setattr(evaluation, "drawn", lambda model, asked_for, settings: asked_for.images_NHWC)
    found = evaluated(run, cache, tmp_path / "out")
    for space in ("pixels", "features"):
        assert found["nearest"][space]["closer"] == 1 and found["nearest"][space]["smallest"] == 0
        assert found["nearest"][space]["closer_real"] < 0.1
    against = found["distances"]["train"]
    assert against["samples"]["frechet"] < 2 * against["real"]["frechet"]
    assert against["samples"]["precision"] == against["samples"]["recall"] == 1


def test_losses_repeat_and_do_not_depend_on_the_chunk(run, clothes, monkeypatch):
    model = artifact.load(run)
    images = read_splits(replace(FRAME, shards=clothes), None, 30).held_out
    first = loss_table(model, images, levels=2)
    assert loss_table(model, images, levels=2) == first
    monkeypatch.setattr("duotone.engine.evaluate.loss_table.CHUNK", 7)
    chunked = loss_table(model, images, levels=2)
    assert [c.loss for c in chunked] == pytest.approx([c.loss for c in first], rel=1e-5)
    real = loss_table_module.losses_of

    def scarce(model, images, rows, *others):
        if rows.stop - rows.start > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return real(model, images, rows, *others)

    monkeypatch.setattr(loss_table_module, "losses_of", scarce)
    halved = loss_table(model, images, levels=2)
    assert [c.loss for c in halved] == pytest.approx([c.loss for c in first], rel=1e-5)
    whole = first[0]
    assert whole.images == 30 and whole.low < whole.loss < whole.high
    parts = [cell for cell in first if cell.sigma == whole.sigma and cell.name != "all"]
    assert sum(c.loss * c.images for c in parts) / 30 == pytest.approx(whole.loss)


def test_losses_are_those_of_every_attribute(tmp_path):
    """Attributes that training makes unknown at random are all known when losses are compared."""
    captioned_shapes.write(tmp_path / "shapes", count=40, size=16)
    images = read_splits(Shards(size=16, threads=1, shards=tmp_path / "shapes"), None, 40).seen
    facts, found = Facts(attributes=tuple(captioned_shapes.ATTRIBUTES)), []
    for dropout in (0.0, 0.9):
        conditions = (Attributes(port="vector", attribute_dropout=dropout),)
        model = replace(TINY, in_channels=3, out_channels=3, zero_init=False)
        path = untrained(tmp_path / "m", conditions, facts, model=model, data=Shards(size=16))
        found.append(loss_table(artifact.load(path), images, levels=2))
    assert found[0] == found[1]


def test_a_loss_of_few_images_has_no_interval():
    table = [loss_table_module.cell(1.0, "x", np.arange(n, dtype=float)) for n in (1, 9, 10)]
    assert [(cell.low, cell.high) for cell in table[:2]] == [(None, None)] * 2
    assert json.loads(json.dumps(asdict(table[0]), allow_nan=False))["low"] is None
    assert table[2].high - table[2].loss == pytest.approx(2.262 * np.arange(10).std(ddof=1) / 10**0.5, rel=1e-3)


def test_losses_of_a_network_of_zeros_are_those_of_its_target(tmp_path):
    """With F = 0 the weighted loss is the mean square of F*, which EDM scales to one if sigma_data is the data's."""
    random = np.random.default_rng(0)
    pixels = ((random.normal(size=(64, 28, 28, 1)) * 0.25).clip(-1, 1) * 127.5 + 127.5).round().astype(np.uint8)
    data = write_shards([Sample(image=p, label=0) for p in pixels], tmp_path / "s", classes=["x"], image_format="npy")
    assert data["count"] == 64
    images = read_splits(replace(FRAME, shards=tmp_path / "s"), None, 640).seen
    path = untrained(tmp_path / "m.safetensors", (Label(),), Facts(classes=("x",)), objective=EDM(sigma_data=0.25))
    for cell in loss_table(artifact.load(path), images, levels=3):
        assert cell.loss == pytest.approx(1, abs=0.03)


# ------------------------------------------------------------------------------------- other conditions and networks


def test_attributes_are_judged_one_by_one(tmp_path, cache):
    captioned_shapes.write(tmp_path / "shapes", count=600, size=16)
    names = tuple(captioned_shapes.ATTRIBUTES)
    model = replace(TINY, in_channels=3, out_channels=3)
    path = untrained(
        tmp_path / "m.safetensors",
        (Attributes(port="vector"),),
        Facts(classes=tuple(captioned_shapes.SHAPES), attributes=names),
        model=model,
        data=Shards(size=16),
    )
    data = read_splits(replace(Shards(size=16, threads=1), shards=tmp_path / "shapes"), None, 600)
    unlabelled = replace(data.train, labels_N=None, classes=None)
    held_out = replace(data.held_out, labels_N=None, classes=None)
    splits = replace(data, train=unlabelled, held_out=held_out, seen=unlabelled)
    settings = evaluation.Settings(
        samples=40,
        steps=1,
        sampler="euler",
        loss_images=4,
        loss_levels=1,
        classifier=ClassifierConfig(width=16, epochs=4),
        cache=cache,
    )
    found = evaluation.evaluate(artifact.load(path), splits, settings)
    assert found.judge.attributes and set(found.by_name) == set(names)
    assert found.accuracy.trials == 40 * len(names) and found.judge.accuracy.value > 0.75
    assert "seen by the classifier as asked" in report.table(found, splits)
    by_class = evaluation.evaluate(artifact.load(path), data, settings)
    said = "(asked by attributes; right if it sees the labels of the images whose attributes were asked for)"
    assert said in report.table(by_class, data) and "as asked" not in report.table(by_class, data)
    assert f"4 images of {data.held_out_is}" in report.table(by_class, data)


@pytest.mark.parametrize("config,extra", [(LowResolution(), 1), (Hole(), 2)], ids=["low_resolution", "hole"])
def test_a_model_that_restores_images_is_given_those_of_the_data(config, extra, clothes, tmp_path, cache):
    model = replace(TINY, extra_channels=extra)
    path = untrained(tmp_path / "m.safetensors", (config,), Facts(), model=model)
    splits = read_splits(replace(FRAME, shards=clothes), None, 400)
    settings = evaluation.Settings(
        samples=40,
        steps=1,
        sampler="euler",
        loss_images=4,
        loss_levels=1,
        classifier=ClassifierConfig(width=32, epochs=4),
        cache=cache,
    )
    found = evaluation.evaluate(artifact.load(path), splits, settings)
    assert found.settings is settings and len(found.samples_NHWC) == 40 and found.accuracy.trials == 40
    if config.kind == "hole":  # most of each picture is the data's own: an untrained network is recognised more often
        assert found.accuracy.value > 0.2


def test_dinov2_from_a_folder(clothes, tmp_path, capsys):
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    network = Dinov2Model(
        Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=14)
    ).eval()
    network.save_pretrained(tmp_path / "dino")
    chosen = choose(FeaturesConfig(network="dinov2", weights=tmp_path / "dino"), None, CPU)
    assert "DINOv2 (16) (as asked for" in capsys.readouterr().out
    images_NHWC = read_splits(replace(FRAME, shards=clothes), None, 3).train.images_NHWC
    features_ND = chosen(images_NHWC)
    assert features_ND.shape == (3, 16) and features_ND.dtype == np.float64
    grey = torch.full((1, 3, 224, 224), 0.5)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    theirs = network(pixel_values=(grey - mean.view(3, 1, 1)) / std.view(3, 1, 1)).last_hidden_state[:, 0]
    torn = shutil.copytree(tmp_path / "dino", tmp_path / "torn")
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(Refused, match="torn holds no model that transformers loads"):
        choose(FeaturesConfig(network="dinov2", weights=torn), None, CPU)
    half = chosen(np.full((1, 28, 28, 1), 127.5).round().astype(np.uint8))
    assert half == pytest.approx(theirs.detach().numpy(), abs=0.05)


def test_the_captioned_shapes_are_still_read_from_their_pixels(tmp_path, capsys):
    facts = Facts(classes=tuple(captioned_shapes.SHAPES), attributes=tuple(captioned_shapes.ATTRIBUTES))
    model = replace(TINY, in_channels=3, out_channels=3, attention=("none", "cross"), context_width=16, heads=(1, 2))
    text = (ByteText(width=16, layers=1, heads=2, length=48),)
    path = untrained(tmp_path / "m.safetensors", text, facts, model=model, data=Shards(size=16))
    cli.main(["evaluate", str(path), "--steps", "1", "--clip", "True", "--json", str(tmp_path / "e.json")])
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["command"].endswith("--sampler heun --seed 1 --clip True")
    assert found["samples"] == 120 and "checker on real renders" in capsys.readouterr().out
    assert set(found) == {
        *("command", "samples", "shape", "colour", "background", "colour_and_background", "everything", "checker")
    }


# --------------------------------------------------------------------------------------------------------- refusals


def refused(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", *arguments])
    assert stop.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--data.shards", "nowhere"], "no such folder"),
        (["--samples", "500"], "held-out set has 400 images.*--samples 400"),
        (["--samples", "16"], "16 features.*--samples 17"),
        (["--floor", "16"], "16 features.*no smaller --floor"),
        (["--floor", "500"], "held-out set has 400 images.*500.*--floor"),
        (["--floor", "-1"], "floor = -1"),
        (["--samples", "0"], "--samples 1 or more"),
        (["--samples", "3", "--classifier.width", "2"], "k = 3 need more than 3 images"),
        (["--loss-images", "-1"], "loss_images"),
        (["--loss-levels", "0"], "loss_levels"),
        (["--classifier.epochs", "0"], "classifier.epochs"),
        (["--features.network", "dinov2"], "--features.weights"),
        (["--features.network", "inception"], "torch-fidelity's .* or torchvision's"),
        (["--sampler", "rk45"], "rk45.*heun"),
        (["--rule", "zero"], "rule 'zero' is unknown: there are plain, apg"),
        (["--spacing", "trailing"], "spacing 'trailing' is unknown to EDM"),
        (["--guidance", "1", "--interval", "0.3", "inf"], "no effect at guidance 1"),
        (["--per-caption", "3"], "--per-caption has no effect on a measurement against data"),
        (
            ["--out", str(FASHION / "t10k-labels-idx1-ubyte.gz" / "out")],
            "labels-idx1-ubyte.gz cannot: give another --out",
        ),
        (["--json", str(FASHION / "t10k-labels-idx1-ubyte.gz" / "x.json")], "cannot: give another --json"),
        (["--json", str(FASHION)], "it is a folder; give a file"),
        (["--cache", str(FASHION / "t10k-labels-idx1-ubyte.gz")], "cannot: give another --cache"),
    ],
)
def test_what_does_not_fit_is_one_line(flags, says, run, cache, tmp_path, capsys):
    import re

    said = refused(capsys, str(run), "--cache", str(cache), "--out", str(tmp_path / "out"), *QUICK, *flags)
    assert re.search(says, said) and said.count("\n") == 1 and said.startswith("duotone: refused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("classes", "library"), [(1008, "torch-fidelity"), (1000, "torchvision")])
def test_inceptions_weights_tell_whose_they_are(classes, library, tmp_path):
    """By their number of classes; if they are incomplete or their library is not installed, one line says so."""
    torch.save({"fc.weight": torch.zeros(classes, 1)}, tmp_path / "inception.pth")
    config = FeaturesConfig(network="inception", weights=tmp_path / "inception.pth")
    with pytest.raises(Refused, match=f"pip install {library}$|is not {library}'s Inception v3"):
        choose(config, None, torch.device("cpu"))
    torch.save({"no": "network"}, tmp_path / "inception.pth")
    with pytest.raises(Refused, match="holds no Inception v3"):
        choose(config, None, torch.device("cpu"))


def test_inception_is_not_trained_on_while_it_measures(tmp_path, monkeypatch):
    """torch-fidelity 0.3 leaves it in training mode, in which an image's features depend on the rest of its batch."""

    class Extractor(torch.nn.BatchNorm2d):
        def __init__(self, name, features, feature_extractor_weights_path):
            super().__init__(3)

        def forward(self, x_NCHW):
            return (super().forward(x_NCHW.float()).mean((2, 3)),)

    library = SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", library)
    embed = features.of_published_distances(tmp_path, {}, CPU)
    images_NHWC = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), dtype=np.uint8)
    np.testing.assert_array_equal(embed(images_NHWC)[:1], embed(images_NHWC[:1]))


def test_published_distances_are_measured_in_tensorflows_inception(tmp_path, monkeypatch):
    """Against torch-fidelity's own network with random weights, on the same pictures, grey ones included."""
    theirs = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3")
    monkeypatch.setattr(theirs, "load_state_dict_from_url", lambda *_, **__: {})
    monkeypatch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    torch.manual_seed(0)
    network = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    monkeypatch.undo()
    torch.save(network.state_dict(), tmp_path / "inception.pth")
    config = FeaturesConfig(network="inception", weights=tmp_path / "inception.pth")
    chosen = choose(config, None, torch.device("cpu"))
    assert chosen.name == "Inception v3 of torch-fidelity (2048)" and chosen.width == 2048
    for channels in (1, 3):
        images_NHWC = np.random.default_rng(channels).integers(0, 256, (3, 32, 32, channels), dtype=np.uint8)
        with torch.inference_mode():
            colours = np.broadcast_to(images_NHWC, (3, 32, 32, 3)).transpose(0, 3, 1, 2)
            (expected,) = network(torch.from_numpy(colours.copy()))
        np.testing.assert_allclose(chosen(images_NHWC), expected.double().numpy(), rtol=1e-6)


def test_data_without_labels_is_refused(run, clothes, tmp_path, capsys):
    images = FASHION / "t10k-images-idx3-ubyte.gz"
    PrepareIdx(images=images, out=tmp_path / "plain", limit=500).run()
    said = refused(capsys, str(run), "--data.shards", str(tmp_path / "plain"), *QUICK, "--out", str(tmp_path / "o"))
    assert "ankle boot" in said and "(none)" in said
    plain = untrained(tmp_path / "m.safetensors", (), Facts())
    said = refused(capsys, str(plain), "--data.shards", str(tmp_path / "plain"), "--samples", "8", "--steps", "1")
    assert "neither labels nor attributes" in said


def test_other_classes_are_refused(clothes, tmp_path, capsys):
    path = untrained(tmp_path / "m.safetensors", (Label(),), Facts(classes=("cat", "dog")))
    said = refused(capsys, str(path), "--data.shards", str(clothes), *QUICK)
    assert "cat, dog" in said and "ankle boot" in said


def test_a_test_set_of_other_classes_is_refused(run, tmp_path, capsys):
    captioned_shapes.write(tmp_path / "shapes", count=120, size=28)
    flags = ["--test", str(tmp_path / "shapes"), "--data.threads", "1", *QUICK]
    assert "other classes" in refused(capsys, str(run), *flags)


def test_a_file_without_its_run_needs_to_be_told_the_data(tmp_path, capsys):
    path = untrained(tmp_path / "m.safetensors", (Label(),), Facts(classes=tuple(GARMENTS)))
    assert "--data.shards" in refused(capsys, str(path), *QUICK)


def test_the_parser_takes_the_documented_flags():
    assert importlib.util.find_spec("duotone.engine.commands.evaluate")
    parsed = cli.flags_of(
        __import__("duotone.engine.commands.evaluate", fromlist=["Evaluate"]).Evaluate,
        ["--data.shards", "a", "--test", "b", "--features.network", "classifier", "--per-caption", "2"],
        "duotone evaluate",
    )
    assert parsed.test == Path("b") and parsed.per_caption == 2
