"""The race on Fashion-MNIST: its clock, its log, what it refuses, and further measurements of its weights."""

import importlib
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotone.data.refusal import Refused
from duotone.engine import artifact, pictures
from duotone.engine.conditioning.base import Facts
from duotone.engine.evaluate.images import Images, Splits

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture
def bench_script(monkeypatch):
    """Imports a script of bench/."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


def test_the_speedrun_is_ready_to_start(bench_script):
    """Training accepts its recipe, and the other side's network draws what the classifier takes."""
    pytest.importorskip("diffusers")
    speedrun = bench_script("speedrun")
    speedrun.recipe.check()
    assert speedrun.IMAGES % (speedrun.CHECKS * speedrun.recipe.batch_size) == 0
    notebook = bench_script("speedrun_notebook")
    torch.manual_seed(0)
    drawn = notebook.samples(notebook.ClassBesideImage().eval(), np.array([0, 9]), steps=2)
    assert drawn.shape == (2, 28, 28, 1) and drawn.dtype == np.uint8


def test_a_training_in_parts_has_one_clock_and_is_checked_where_it_was_due(bench_script, monkeypatch, tmp_path):
    """Time between two parts does not count, and a checkpoint written only because a part ended is not measured."""
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--scratch", str(tmp_path)])
    speedrun = bench_script("speedrun")
    clock = speedrun.Clock([speedrun.Part(100.0, 50.0, 60.0, 1.0), speedrun.Part(1000.0, 30.0, 40.0, 1.0)])
    assert (clock.seconds, clock.cpu_seconds) == (80.0, 100.0)
    assert [clock.at(moment) for moment in (100, 120, 150, 500, 1010, 1030, 2000)] == [0, 20, 50, 50, 60, 80, 80]
    for images in (32, 40, 64):
        (tmp_path / f"images-{images:012d}").mkdir()
    assert [path.name[-2:] for path in speedrun.last(tmp_path, "images-*", 32)] == ["32", "64"]


def test_a_records_log_is_the_runs_in_equal_parts(bench_script, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["speedrun.py", "--scratch", str(tmp_path)])
    speedrun = bench_script("speedrun")
    line = {"grad_norm": 1.0, "learning_rate": 1e-3, "images_per_second": 100.0}
    lines = [line | {"images": images, "loss": float(images)} for images in (1, 10, 20, 30, 40)]
    lines[0] |= {"grad_norm": None}  # a step that was skipped
    lines[3] |= {"loss": None}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    rows = speedrun.log_by_parts(tmp_path / "metrics.jsonl", parts=2)
    assert [(row["images"], row["loss"]) for row in rows] == [(20, pytest.approx(31 / 3, abs=1e-5)), (40, 40.0)]
    assert [row["grad_norm"] for row in rows] == [1.0, 1.0]


def test_the_way_back_from_noise_begins_at_the_given_images_chunk_by_chunk(bench_script):
    sampling = bench_script("speedrun_sampling")
    images_NHWC = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    under = sampling.StartFromNoised(images_NHWC, lambda denoise, x_NCHW, sigmas: x_NCHW)
    noise_NCHW = torch.randn(5, 1, 4, 4)
    begun = torch.cat([under(None, part_NCHW, None) for part_NCHW in noise_NCHW.split(3)])
    assert np.array_equal(pictures.pixels(begun - noise_NCHW), images_NHWC)


def test_training_images_drawn_afresh_have_the_wanted_labels_and_none_twice(bench_script):
    noises = bench_script("speedrun_noises")
    labels_M, wanted_N = np.arange(400) % 4, np.random.default_rng(0).permutation(np.arange(80) % 4)
    places_N = noises.of_each_class(labels_M, wanted_N, seed=3)
    assert np.array_equal(labels_M[places_N], wanted_N) and len(set(places_N)) == len(wanted_N)
    assert not np.array_equal(places_N, noises.of_each_class(labels_M, wanted_N, seed=4))


def test_the_luck_of_a_noise_is_told(bench_script):
    noises = bench_script("speedrun_noises")
    rows = [{"frechet": d, "accuracy": {"value": share}} for d, share in [(2.0, 0.9), (4.0, 0.8)]]
    assert noises.summary(rows) == pytest.approx({"frechet": 3.0, "deviation": math.sqrt(2), "recognised": 0.85})
    assert noises.summary(rows[:1]) == {"frechet": 2.0, "deviation": None, "recognised": 0.9}


def test_weights_that_draw_something_else_are_refused(bench_script, tmp_path):
    noises, speedrun = bench_script("speedrun_noises"), bench_script("speedrun")
    garments = Facts(classes=tuple(f"garment {k}" for k in range(10)))

    def saved(recipe, facts) -> Path:
        path = tmp_path / "ema.safetensors"
        artifact.save(path, artifact.build(recipe, facts).state_dict(), recipe, facts, 320)
        return path

    assert noises.loaded(saved(speedrun.recipe, garments)).images == 320
    larger = replace(speedrun.recipe, data=replace(speedrun.recipe.data, size=32))
    with pytest.raises(Refused, match="does not draw garments of 28 px by class"):
        noises.loaded(saved(larger, garments))
    with pytest.raises(Refused, match="does not draw garments of 28 px by class"):
        noises.loaded(saved(replace(speedrun.recipe, conditioning=()), Facts()))


def test_images_brought_back_from_noise_are_asked_for_and_judged_by_their_own_labels(bench_script, monkeypatch):
    """Never by the course's own labels, which are sorted by class."""
    sampling = bench_script("speedrun_sampling")
    labels_N = np.random.default_rng(0).permutation(np.arange(20) % 4)
    images_NHWC = np.broadcast_to(labels_N[:, None, None, None], (20, 4, 4, 1)).astype(np.uint8)
    held_out = Images(images_NHWC=images_NHWC, fingerprint="held out", labels_N=labels_N)
    splits = Splits(train=held_out, held_out=held_out, held_out_is="test", seen=held_out)
    course = sampling.Course(splits=splits, judge=None, real=None, statistics=None, floor=1.0, labels_N=labels_N * 0)
    asked, judged = [], []

    def samples(model, labels_N, how, sampler, **rest):
        asked.append(labels_N)
        return pictures.pixels(sampler.left_NCHW)

    def described(course, drawn):
        judged.append((drawn[:, 0, 0, 0], course.labels_N))
        return {"accuracy": {"value": 1.0}, "frechet": 0.0, "within": 1.0, "between": 1.0}

    monkeypatch.setattr(sampling, "SAMPLES", 10)
    monkeypatch.setattr(sampling, "samples", samples)
    monkeypatch.setattr(sampling, "with_sampling_range", lambda model, how: model)
    monkeypatch.setattr(sampling, "described", described)
    rows = sampling.from_real(course, None)
    assert len(judged) == len(asked) + 1 == len(rows)
    assert all(np.array_equal(images_N, labels_N) and len(labels_N) == 10 for images_N, labels_N in judged)
    assert all(np.array_equal(labels_N, judged[0][1]) for labels_N in asked)


def test_a_speedrun_on_a_gpu_that_is_not_there_is_refused_before_anything_is_written(tmp_path):
    command = [sys.executable, str(BENCH / "speedrun.py"), "--scratch", str(tmp_path / "new"), "--device", "cuda"]
    done = subprocess.run(command, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 2 and "no CUDA device; leave it out" in done.stderr.splitlines()[-1] and not done.stdout
    assert not (tmp_path / "new").exists()


def test_the_notebooks_budget_is_what_our_side_used(bench_script, monkeypatch, capsys, tmp_path):
    speedrun = bench_script("speedrun")

    def budget(*flags) -> float:
        monkeypatch.setattr(sys, "argv", ["speedrun.py", "--scratch", str(tmp_path), "--side", "notebook", *flags])
        speedrun.parsed.cache_clear()
        return speedrun.budget()

    assert budget("--core-seconds", "7") == 7
    for flags, said in (((), "engine.json does not exist"), (("--core-seconds", "0"), "--core-seconds 0")):
        with pytest.raises(SystemExit) as stop:
            budget(*flags)
        errors = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and len(errors) == 1 and said in errors[0]
    parts = [{"began": 0.0, "seconds": 9.0, "cpu_seconds": used, "load": 1.0} for used in (60.0, 40.0)]
    (tmp_path / "engine.json").write_text(json.dumps(parts))
    assert budget() == 100 and budget("--core-seconds", "7") == 7
    speedrun.parsed.cache_clear()


def test_a_budget_that_is_not_known_is_refused_before_anything_is_written(tmp_path):
    command = [sys.executable, str(BENCH / "speedrun.py"), "--scratch", str(tmp_path / "new"), "--side", "notebook"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "give --core-seconds" in done.stderr
    assert not done.stdout and not (tmp_path / "new").exists()


def test_weights_that_are_not_there_are_refused_before_anything_is_measured(tmp_path):
    command = [sys.executable, str(BENCH / "speedrun_noises.py"), "--scratch", str(tmp_path / "new")]
    for flags, says in [((), "train first, or give the path"), (("--noises", "0"), "give at least 1")]:
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        assert done.returncode == 2 and says in done.stderr.splitlines()[-1] and not done.stdout
    assert not (tmp_path / "new").exists()
