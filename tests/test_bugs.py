"""The bench of published bugs: each is really planted, is named by the doctor, trains and is measured on real images."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from duotone.data.prepare.idx import PrepareIdx
from duotone.data.refusal import Refused

ROOT = Path(__file__).parent.parent
FASHION = Path("/usr/share/datasets/fashion-mnist")
IMAGES, SAMPLES = 96, 20
NULL = 10  # Fashion-MNIST's classes are 0 to 9
NAMES = ("sound", "dropout", "timestep", "batchnorm", "sinusoid")


@pytest.fixture(scope="module")
def bugs():
    """The bench, with sampling and batch norm's statistics cut short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "bench"))
        module = importlib.import_module("bugs")
        for name, value in {"STEPS": 2, "LEVELS": 2, "BATCHES_FOR_STATISTICS": 2}.items():
            patch.setattr(module, name, value)
        yield module


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    """The first few hundred images of each set, as the bench would prepare all of them."""
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not on this machine")
    folder = tmp_path_factory.mktemp("bugs")
    for split in ("train", "t10k"):
        images, labels = (FASHION / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
        PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=folder / "shards" / split, limit=256).run()
    return folder


def called(bugs, *flags) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["bugs.py", *map(str, flags)])
        bugs.main()


class LabelsSeen:
    """The labels that reach the network while it trains."""

    def __init__(self):
        self.rows: list[int] = []

    def __call__(self, module, inputs) -> None:
        if isinstance(module, nn.Embedding) and module.training:
            self.rows += inputs[0].tolist()

    @property
    def dropped(self) -> float:
        return self.rows.count(NULL) / len(self.rows)


@pytest.fixture(scope="module")
def dropped(bugs, scratch):
    """Trains every run for a few steps; gives the share of its labels that were dropped before the network."""
    shares = {}
    for name in NAMES:
        seen = LabelsSeen()
        hook = nn.modules.module.register_module_forward_pre_hook(seen)
        called(bugs, "--scratch", scratch, "--images", IMAGES, "--train", name)
        hook.remove()
        shares[name] = seen.dropped if seen.rows else None
        clock = {"images": IMAGES, "core_seconds": 1.0, "seconds": 1.0, "load_average": 0.0}
        (scratch / "bugs" / f"{name}.json").write_text(json.dumps(clock))
    return shares


@pytest.fixture(scope="module")
def record(bugs, scratch, dropped) -> dict:
    path = scratch / "out" / "bugs.json"
    only = [flag for name in NAMES for flag in ("--only", name)]
    called(bugs, "--scratch", scratch, "--images", IMAGES, "--samples", SAMPLES, "--json", path, *only)
    return json.loads(path.read_text())


@pytest.mark.parametrize(
    "name,says",
    [
        ("sound", None),
        ("dropout", "fault: label.dropout: configured 10.0%, measured at the network's input 5"),
        ("timestep", "fault: timesteps: 1 of 1000 timesteps are never trained (t = 999)"),
        ("batchnorm", "fault: network: down_blocks.0.resnets.0.norm1 and 23 more normalise over the batch"),
        ("sinusoid", "warning: label.encoding: the class number is fed as a sinusoid"),
    ],
)
def test_the_doctor_names_what_is_planted_and_nothing_else(name, says, bugs):
    found = bugs.diagnosis(bugs.bug_named(name).recipe)
    assert len(found) == (says is not None) and all(line.startswith(says) for line in found), found


def test_a_planted_bug_is_all_that_differs(bugs):
    sound, _, timestep, batchnorm, *_ = (bugs.bug_named(name).recipe for name in bugs.NAMES)
    u_N = torch.arange(1000, dtype=torch.float64) / 1000
    last = sound.objective.sigmas[-1]
    assert last in sound.objective.draw_sigma(u_N) and last not in timestep.objective.draw_sigma(u_N)
    torch.manual_seed(0)
    ours = sound.model.build().state_dict()
    torch.manual_seed(0)
    theirs = batchnorm.model.build().state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_rates_at_the_networks_input_are_those_of_the_bug(dropped):
    assert 0.4 < dropped["dropout"] < 0.68
    assert dropped["sinusoid"] is None  # it has no row for a class
    others = [dropped[name] for name in ("sound", "timestep", "batchnorm")]
    assert len(set(others)) == 1 and 0.02 < others[0] < 0.2


def test_every_run_is_measured(record):
    rows = {row["bug"]: row for row in record["results"]}
    assert tuple(rows) == NAMES
    assert [name for name in NAMES if "own_batch" in rows[name]] == ["batchnorm"]
    for row in rows.values():
        assert row["guided"]["accuracy"]["trials"] == SAMPLES and row["guided"]["frechet"] > 0
        assert 0 < row["last_step"]["low"] < row["last_step"]["high"] < 2 and len(row["losses"]) == 2
    assert len({row["losses"][0]["loss"] for row in rows.values()}) == len(rows)
    assert record["machine"]["commit"] and record["command"].startswith("python bench/bugs.py --scratch DIR")


def test_the_course_is_laid_alone(bugs, scratch, record, capsys):
    """Its classifier is the one that judged the runs."""
    assert len(record["classifier_digest"]) == 16
    fashion = importlib.import_module("fashion")
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["fashion.py", "--scratch", str(scratch)])
        fashion.main()
    out = capsys.readouterr().out
    assert out.count("256 images in") == 2 and str(scratch / "shards" / "t10k") in out
    assert fashion.Course.prepared(scratch).judge.key == record["classifier_digest"] and "floor " in out


def test_the_picture_has_a_row_for_each_set_of_samples(bugs, scratch, record):
    from PIL import Image

    with Image.open(scratch / "out" / "bugs.png") as opened:
        width, height = opened.size
    assert (width, height) == (2 * (20 * 30 + 2), 2 * (len(bugs.PICTURED) * 30 + 2))


def test_one_run_is_measured_again_and_the_others_stay(bugs, scratch, record):
    path = scratch / "out" / "bugs.json"
    flags = ("--scratch", scratch, "--images", IMAGES, "--samples", SAMPLES, "--json", path)
    called(bugs, *flags, "--only", "dropout")
    assert json.loads(path.read_text())["results"] == record["results"]


def test_a_training_that_fails_is_told_in_one_line(bugs, scratch, dropped, monkeypatch):
    """The folder holds a run with another budget, which the training process refuses."""
    with pytest.raises(Refused, match="training sound ended with 2: .* holds another run"):
        bugs.trained(bugs.bug_named("sound"), scratch, 2 * IMAGES)


@pytest.mark.parametrize(
    "flags,says", [(("--images", 100), "not a multiple of batch_size"), (("--samples", 3), "two of each class")]
)
def test_numbers_that_do_not_fit_are_refused(flags, says, bugs, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        called(bugs, "--scratch", tmp_path, *flags)
    errors = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and len(errors) == 1 and says in errors[0]
