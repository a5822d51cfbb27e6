"""Bad input: one line that names what, where and the remedy, exit code 2, nothing written, nothing lost."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from duotone.data import captioned_shapes
from duotone.data.prepare.image_folder import PrepareFolder
from duotone.data.refusal import Refused
from duotone.engine import artifact, checkpoint, main, run_folder
from duotone.engine.cli import main as duotone
from duotone.engine.command_line import parse
from duotone.engine.commands.sample import Sample
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.text import ByteText, ClipText, EncoderText
from duotone.engine.exchange import diffusers_folder
from duotone.engine.exchange.starting_weights import begin_from
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.optimizers.muon import Muon
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_file import recipe_at
from duotone.engine.recipe_json import differences, from_json, to_json
from duotone.engine.speed import Speed

RECIPE = Path(__file__).with_name("tiny_recipe.py")
COCO = Path(__file__).parents[2] / "recipes" / "coco_clip.py"


def tiny() -> Recipe:
    import importlib.util

    spec = importlib.util.spec_from_file_location("tiny_recipe", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.recipe


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-sise", "3"], "--batch-sise.*nearest key is --batch-size"),
        (["--objective.stepz", "3"], "--objective.stepz"),
        (["--optimizer.rl", "3"], "nearest key is --optimizer"),
        (["--batch-size", "many"], "--batch-size.*'many'"),
        (["--objective.loss", "cubic"], "'cubic'.*--objective.loss.*'huber'"),
        (["--speed.precision", "fp8"], "'fp8'.*--speed.precision"),
        (["--zero.stage", "4"], "'4'.*--zero.stage"),
        (["objective:foo"], "objective:foo is unknown: give one of objective:edm, objective:ddpm, objective:flow"),
        (["--objective", "foo"], "--objective is unknown: give one of objective:edm"),
        (["conditioning.0:bogus"], "conditioning.0:bogus is unknown: give one of conditioning.0:clip-text"),
        (["objective:flow", "--objective.sigma-data", "3"], "--objective.sigma-data belongs to objective:edm: choose"),
        (["--objective.rescale-zero-snr"], "--objective.rescale-zero-snr belongs to objective:ddpm"),
        (["--conditioning.0.encoder", "x"], "--conditioning.0.encoder belongs to .*0:clip-text and .*0:encoder-text"),
    ],
)
def test_a_wrong_name_or_value_is_one_line_with_the_nearest_key(flags, says):
    with pytest.raises(Refused, match=says) as refusal:
        parse(Recipe, flags, default=tiny())
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--batch-size", "-3"], "batch_size = -3: it must be at least 1"),
        (["--images", "100"], "not a multiple of batch_size = 8: 96 would be"),
        (["--seed", str(2**64)], "seed = 18446744073709551616: it must be below 2\\^64"),
        (["--checkpoint.every", "12"], "checkpoint.every = 12"),
        (["--optimizer.lr", "-1"], "optimizer.lr = -1.0: it must be above 0"),
        (["--optimizer.lr", "nan"], "optimizer.lr = nan: it must be above 0, and finite"),
        (["--optimizer.clip", "nan"], "optimizer.clip = nan"),
        (["--objective.log-mean", "nan"], "objective.log_mean = nan"),
        (
            ["--model.attention", "cross", "none", "--model.middle", "self", "--model.heads", "2", "3"],
            "model.heads = 3 does not divide the width 16 of the middle",
        ),
        (["--optimizer.betas", "0.9", "1.5"], "optimizer.betas"),
        (["--conditioning.0.dropout", "3"], "conditioning.0.dropout = 3.0"),
        (["--conditioning.0.width", "32"], "model.context_width = 16, but the text's width is 32"),
        (["--model.groups", "7"], "model.groups = 7 does not divide"),
        (["--model.heads", "2"], "model.heads has 1 entries and model.channels 2"),
        (["--model.attention", "none", "none", "--model.middle", "none"], "no cross level"),
        (["--data.channels", "1"], "model.in_channels = 3, but data.channels = 1"),
        (["--data.channels", "1", "--model.in-channels", "1"], "model.out_channels = 3, but data.channels = 1"),
        (["--model.groups", "0"], "model.groups = 0: it must be at least 1"),
        (["--model.time-width", "0"], "model.time_width = 0"),
        (["--preview.sampler", "huen"], "preview: sampler 'huen' is unknown: there are euler"),
        (["--preview.steps", "0"], "preview.steps = 0: it must be at least 1"),
        (["--preview.columns", "0"], "preview.columns = 0"),
        (["--preview.guidance", "inf"], "preview.guidance = inf"),
        (
            ["objective:ddpm", "--objective.steps", "4", "--preview.steps", "9"],
            "preview: steps = 9: noise levels must fall",
        ),
        (["--objective.sigma-data", "0"], "objective.sigma_data = 0.0: it must be above 0"),
        (["--objective.log-std", "inf"], "objective.log_std = inf"),
        (["--objective.rho", "-1"], "objective.rho = -1.0"),
        (["--objective.log-mean", "nan"], "objective.log_mean = nan"),
        (["--objective.sigma-min", "90"], "objective.sigma_min = 90.0, objective.sigma_max = 80.0"),
        (["--log.every", "0"], "log.every = 0"),
        (["--ema.half-life", "-5"], "ema.half_life = -5"),
        (["--ema.power", "0.7", "--ema.max-decay", "1.1"], "ema.max_decay = 1.1"),
        (["--checkpoint.keep", "0"], "checkpoint.keep = 0"),
        (["--zero.bucket", "0"], "zero.bucket = 0"),
        (["--zero.bucket", "1000001"], "zero.bucket = 1000001.*even"),
    ],
)
def test_a_value_out_of_range_or_a_bad_combination_is_named(flags, says):
    with pytest.raises(Refused, match=says):
        parse(Recipe, flags, default=tiny()).check()


@pytest.mark.parametrize(
    ("condition", "says"),
    [
        (ByteText(length=1), "ByteText.length = 1: it must be at least 2"),
        (ByteText(width=16, heads=3), "ByteText.heads = 3 does not divide its width of 16"),
        (EncoderText(length=0), "EncoderText.length = 0"),
    ],
)
def test_a_text_that_cannot_be_built_is_named(condition, says):
    with pytest.raises(Refused, match=says):
        condition.build(UNetConfig(context_width=16), Facts())


def misfits(value) -> list:
    """Values of another type than a field's own, as a recipe's file may hold them."""
    whole = [float(value), value + 0.5] if type(value) is int else []
    return [*whole, 7 if isinstance(value, str) else str(value), object()]


def with_one_misfit(part, key: str = "") -> Iterator[tuple[str, Callable]]:
    """(key, make) for every field of a dataclass and of those inside it, and every misfit: make() is the part that has it."""
    for field in fields(part):
        name, value = key + field.name, getattr(part, field.name)
        for misfit in misfits(value):
            if not (
                isinstance(misfit, str) and name in ("out", "start", "data.shards")
            ):  # a path may be written as a string
                yield name, partial(replace, part, **{field.name: misfit})
        inside = enumerate(value) if isinstance(value, tuple) else [(None, value)]
        for place, inner in inside:
            if is_dataclass(inner):
                for below, make in with_one_misfit(inner, f"{name}." if place is None else f"{name}.{place}."):
                    yield below, partial(with_inner, part, field.name, place, make)


def with_inner(part, field: str, place: int | None, make: Callable):
    if place is None:
        return replace(part, **{field: make()})
    values = getattr(part, field)
    return replace(part, **{field: (*values[:place], make(), *values[place + 1 :])})


@pytest.mark.parametrize("objective", [EDM(), DDPM(), Flow()])
def test_a_value_of_another_type_is_named_with_its_key(objective):
    """A recipe is Python, where images=1e6 is a float; a number as a string passes no comparison."""
    recipe = replace(tiny(), objective=objective, optimizer=Muon() if objective == DDPM() else tiny().optimizer)
    tried = 0
    for key, make in with_one_misfit(recipe):
        with pytest.raises(Refused, match=f"^{re.escape(key)} = "):
            make().check()
        tried += 1
    assert tried > 200


def test_a_recipe_file_with_a_value_of_another_type_is_refused_in_one_line(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        RECIPE.read_text().replace("images=96", "images=1e6").replace("Shards(size=16)", "Shards(size=16), out='x'")
    )
    done = subprocess.run([sys.executable, file, "--batch-size", "4"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "duotone: refused: images = 1000000.0: it must be int\n")
    with pytest.raises(Refused, match="images = 1000000.0: it must be int"):
        recipe_at(file, [], "duotone doctor")


def test_counts_may_be_written_short():
    assert parse(Recipe, ["--images", "1e6", "--batch-size", "1e3"], default=tiny()).images == 1_000_000
    assert parse(Recipe, ["--images=1e6", "--optimizer.lr=1e-3"], default=tiny()).images == 1_000_000
    assert parse(Recipe, ["--accumulation", "1e1", "--model.channels", "1e2", "16"], default=tiny()).accumulation == 10
    words = parse(Sample, ["--label", "1e6", "--prompt", "2e3", "--count", "1e1"])
    assert (words.label, words.prompt, words.count) == (("1e6",), ("2e3",), 10)


def test_a_recipe_survives_json_and_builds_no_foreign_type():
    recipe = tiny()
    assert from_json(json.loads(json.dumps(to_json(recipe)))) == recipe
    # Up to version 0.1 a type was stored with its module: such a run can still be resumed.
    stored = to_json(recipe)
    stored["optimizer"]["type"] = "duotone.engine.elsewhere:AdamW"
    assert from_json(stored) == recipe and not differences(stored, recipe)
    for name in ("os:system", "duotone.engine.train:train", "duotone..os:path", "duotone.engine.nothing:Here"):
        with pytest.raises(Refused, match="type"):
            from_json({"type": name})


@pytest.mark.parametrize("where", ["model", "objective", "conditioning"])
def test_a_model_that_says_more_than_this_version_knows_is_refused(where):
    """Ignoring a later version's field would draw other pictures, unless it is off or only concerns training."""
    header = artifact.header(tiny(), Facts(), 0)
    stored = json.loads(header["duotone.recipe"])
    part = stored["conditioning"][0] if where == "conditioning" else stored[where]
    stored["optimizer"]["later"] = 1.5
    part["later"] = False
    written = header | {"duotone.recipe": json.dumps(stored)}
    assert artifact.recipe_in(written, Path("a.safetensors")).model == tiny().model
    part["later"] = 1.5
    with pytest.raises(Refused, match=rf"a.safetensors says {where}.*later = 1.5, .* update duotone"):
        artifact.recipe_in(header | {"duotone.recipe": json.dumps(stored)}, Path("a.safetensors"))


def refused(*arguments: str, cwd: Path) -> str:
    """The one line of a command that must be refused, after checking that deepspeed was not loaded for it."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, env=environment, timeout=120
    )
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("duotone: refused:")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_wrong_key_is_refused_before_deepspeed_and_transformers_are_loaded(tmp_path):
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['x', '--batch-sise', '3', '--local_rank=0']\n"
        "try:\n"
        f"    runpy.run_path({str(COCO)!r}, run_name='__main__')\n"
        "except SystemExit as stop:\n"
        "    loaded = {'deepspeed', 'transformers', 'nvidia.dali', 'xformers'} & set(sys.modules)\n"
        "    assert stop.code == 2 and not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "nearest key is --batch-size" in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rank,says", [("0", "duotone: refused: "), ("1", "duotone: refused on rank 1 (")])
def test_a_rank_that_refuses_alone_is_heard(rank, says, tmp_path):
    """A fault of one machine alone is reported by its own rank, after the other ranks had time to report the same."""
    alone = "import duotone.engine.entry as entry, runpy, sys; entry.ONLY_THIS_RANK = 0.1\n"
    alone += f"sys.argv = ['recipe', '--batch-size', '0']; runpy.run_path({str(RECIPE)!r}, run_name='__main__')"
    environment = os.environ | {"RANK": rank, "WORLD_SIZE": "2", "LOCAL_RANK": rank}
    done = subprocess.run([sys.executable, "-c", alone], env=environment, capture_output=True, text=True, cwd=tmp_path)
    lines = [line for line in done.stderr.splitlines() if "refused" in line]
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith(says) and "batch_size = 0" in lines[0]


def test_arithmetic_that_is_not_to_be_had_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    """Such as fp16 on most CPUs."""
    from deepspeed.accelerator import get_accelerator

    from duotone.engine.train import train

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: False)
    with pytest.raises(Refused, match="speed.precision = fp16: DeepSpeed does not train in fp16 on this machine's CPU"):
        train(replace(tiny(), out=tmp_path / "run", speed=Speed(device="cpu", precision="fp16")))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    captioned_shapes.write(folder, count=16, size=16, seed=0)
    return folder


def without_captions(shards: Path, to: Path) -> None:
    to.mkdir()
    with tarfile.open(next(shards.glob("*.tar"))) as old, tarfile.open(to / "00000.tar", "w") as new:
        for member in old:
            if member.name.endswith(".jpg"):
                new.addfile(member, old.extractfile(member))


def damaged(shards: Path, to: Path) -> None:
    shutil.copytree(shards, to)
    tar = next(to.glob("*.tar"))
    tar.write_bytes(b"not a tar at all" * 1000)


DATA = {
    "missing": (lambda s, t: None, "there is no such folder"),
    "empty": (lambda s, t: t.mkdir(), "it holds no .tar shards"),
    "no tar": (damaged, "it is not a tar"),
    "no captions": (without_captions, "it has no captions"),
}


def test_of_a_flag_that_is_given_again_the_last_counts():
    """A flag appended to a command overrides an earlier one, wherever that is and however it is spelt."""
    flags = [
        "optimizer:muon",
        "--log.every",
        "5",
        "--optimizer.warmup",
        "20",
        "--model.channels",
        "8",
        "8",
        "--no-flip",
    ]
    flags += ["--log.every=7", "--model.channels", "16", "24", "--flip", "--batch_size", "4"]
    recipe = parse(Recipe, flags, default=tiny())
    assert (recipe.log.every, recipe.optimizer.warmup, recipe.model.channels) == (7, 20, (16, 24))
    folder = parse(PrepareFolder, ["--size", "8", "photographs", "--out", "x", "--size", "9"])
    assert (folder.size, str(folder.images)) == (9, "photographs"), "which stands behind a flag that is given again"
    assert recipe.flip and recipe.batch_size == 4 and type(recipe.optimizer).__name__ == "Muon"


@pytest.mark.parametrize("fault", DATA)
def test_shards_that_cannot_be_used_are_refused_and_nothing_is_written(fault, shards, tmp_path):
    make, says = DATA[fault]
    make(shards, tmp_path / "absent-shards")
    line = refused(str(RECIPE), "--data.shards", "absent-shards", "--out", "run", cwd=tmp_path)
    assert "absent-shards" in line and says in line
    assert not (tmp_path / "run").exists()


def test_an_unreachable_clip_is_one_line(shards, tmp_path):
    with pytest.raises(
        Refused, match="text encoder 'nobody/nothing' cannot be loaded.*conditioning.0.encoder"
    ) as refusal:
        ClipText(encoder="nobody/nothing").build(UNetConfig(), Facts())
    assert "\n" not in str(refusal.value)


def test_another_run_in_the_folder_is_refused_with_the_differing_fields(shards, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    recipe = tiny()
    stored = to_json(recipe) | {"seed": 7, "batch_size": 16}
    (folder / "recipe.json").write_text(json.dumps(stored))
    line = refused(str(RECIPE), "--data.shards", str(shards), "--out", "run", cwd=tmp_path)
    assert "seed: 7 there, 0 here" in line and "batch_size: 16 there, 8 here" in line and "--fresh" in line
    assert sorted(p.name for p in folder.iterdir()) == ["recipe.json"]


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_folder_that_is_no_run_is_left_alone(flags, shards, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("years of work")
    line = refused(str(RECIPE), "--data.shards", str(shards), "--out", "run", *flags, cwd=tmp_path)
    assert "not a run's folder" in line
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert (tmp_path / "run" / "thesis.txt").read_text() == "years of work"


# ------------------------------------------------------------------------------------- checkpoints and artefacts


def tensors() -> dict:
    return {kind: {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0)} for kind in checkpoint.KINDS}


def test_a_checkpoint_that_does_not_verify_is_passed_over_by_name(tmp_path):
    checkpoint.publish(tmp_path, 8, tensors(), {})
    newer = checkpoint.publish(tmp_path, 16, tensors(), {})
    data = bytearray((newer / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (newer / "ema.safetensors").write_bytes(data)
    found, passed_over = checkpoint.newest(tmp_path)
    assert found.name.endswith("000000000008")
    assert len(passed_over) == 1 and "ema.safetensors differs" in passed_over[0]
    (newer / "manifest.json").write_text("{")
    assert checkpoint.newest(tmp_path)[0] == found
    shutil.rmtree(found)
    with pytest.raises(Refused, match="000000000016 passed over: .*put one back, or give --fresh"):
        checkpoint.newest(tmp_path)  # it must not decide to start over
    shutil.rmtree(newer)
    assert checkpoint.newest(tmp_path) == (None, [])


def test_what_the_disk_does_not_give_is_no_damage(tmp_path, monkeypatch):
    """If an unreadable but intact checkpoint were skipped, its steps would be trained again and it would be removed."""
    checkpoint.publish(tmp_path, 8, tensors(), {})
    newer = checkpoint.publish(tmp_path, 16, tensors(), {})

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "digest", denied)
    with pytest.raises(Refused, match=f"checkpoint {newer} cannot be read .*Permission denied.*: fix that"):
        checkpoint.newest(tmp_path)


def test_only_checkpoints_by_their_own_names_are_the_runs(tmp_path):
    """A run neither resumes from nor removes the copies and links that a user keeps beside its checkpoints."""
    kept = checkpoint.publish(tmp_path, 16, tensors(), {})
    for name in ("images-best", f"{kept.name}-mine"):
        shutil.copytree(kept, tmp_path / name)
    (tmp_path / checkpoint.name_of(8)).symlink_to(tmp_path / "images-best")
    last = checkpoint.publish(tmp_path, 24, tensors(), {})
    assert checkpoint.newest(tmp_path) == (last, [])
    checkpoint.retire(tmp_path, 1, images=24)
    assert {path.name[7:] for path in tmp_path.iterdir()} == {
        "best",
        "000000000016-mine",
        "000000000008",
        "000000000024",
    }
    shutil.copytree(tmp_path / f"{kept.name}-mine", tmp_path / checkpoint.name_of(32))
    found, (fault,) = checkpoint.newest(tmp_path)
    assert found == last and "manifest.json is not of images-000000000032" in fault


def test_a_checkpoint_can_be_read_by_whoever_may_read_its_folder(tmp_path):
    path = checkpoint.publish(tmp_path, 8, tensors(), {})
    (tmp_path / "opened").write_bytes(b"")
    assert {file.stat().st_mode for file in path.iterdir()} == {(tmp_path / "opened").stat().st_mode}


def test_what_a_killed_process_left_of_its_writing_is_no_strangers_and_goes(tmp_path):
    """Files such as .NAME.1a2b3c4d, from before and after recipe.json was written."""
    for name in (".claim", ".recipe.json.0123abcd", ".ema.safetensors.89abcdef"):
        (tmp_path / name).write_text("")
    run_folder.refuse_foreign_folder(tmp_path)
    (tmp_path / "previews").mkdir()
    (tmp_path / "previews" / ".images-000000000016.png.01234567").write_text("")
    (tmp_path / ".hidden").write_text("somebody's")
    with run_folder.claimed(tmp_path):
        left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*"))
    assert left == [".claim", ".hidden", "previews"]


def test_rows_that_nobody_here_wrote_block_no_run(tmp_path):
    rows = [b'{"images": 8}', b"12", b"\xff\xfe", b'{"loss": 1}', b'{"images": 16}', b'{"images": 24}', b'{"ima']
    (tmp_path / "metrics.jsonl").write_bytes(b"\n".join(rows))
    run_folder.keep_rows_up_to(tmp_path / "metrics.jsonl", 16)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"images": 8}\n{"images": 16}\n'


def test_what_the_disk_refuses_is_one_line(ema, tmp_path, monkeypatch, capsys):
    """From the command line as well as from a recipe; and a dangling link is not overwritten."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for flags, says in (
        (["export", str(ema), "--format", "safetensors", "--out", "x" * 300], "File name too long"),
        (["export", str(ema), "--format", "diffusers", "--out", "x" * 300], "File name too long"),
        (["export", str(ema), "--out", "link"], "link exists"),
    ):
        with pytest.raises(SystemExit, match="2"):
            duotone(flags)
        told = capsys.readouterr().err
        assert told.startswith("duotone: refused: ") and says in told and told.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["tiny_recipe.py", "--out", "x" * 300])
    with pytest.raises(SystemExit, match="2"):
        main(tiny())
    told = capsys.readouterr().err
    assert told.startswith("duotone: refused: ") and "File name too long" in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_damaged_checkpoints_push_no_readable_one_out(tmp_path):
    """A run that resumes from an earlier checkpoint writes lower numbers than those of the damaged ones."""
    for images in (32, 40, 8, 16, 24):
        checkpoint.publish(tmp_path, images, tensors(), {})
    for images in (32, 40):
        (tmp_path / checkpoint.name_of(images) / "manifest.json").write_text("{")
    checkpoint.retire(tmp_path, 2, images=24)
    assert [int(path.name[-2:]) for path in sorted(tmp_path.iterdir())] == [16, 24, 32, 40]
    assert checkpoint.newest(tmp_path)[0].name == checkpoint.name_of(24)
    checkpoint.publish(tmp_path, 40, tensors(), {})
    checkpoint.retire(tmp_path, 1, images=40)
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name_of(40)]


@pytest.mark.parametrize(
    ("error", "seen"), [(OSError("disk full"), Refused), (KeyboardInterrupt("disk full"), KeyboardInterrupt)]
)
def test_an_interrupted_write_is_never_seen(tmp_path, monkeypatch, error, seen):
    checkpoint.publish(tmp_path, 8, tensors(), {})
    monkeypatch.setattr(checkpoint, "digest", lambda path: (_ for _ in ()).throw(error))
    with pytest.raises(seen, match="disk full"):
        checkpoint.publish(tmp_path, 16, tensors(), {})
    assert [p.name for p in tmp_path.iterdir()] == ["images-000000000008"]


def test_a_checkpoint_of_another_network_is_refused(tmp_path):
    path = checkpoint.publish(tmp_path, 8, tensors(), {})
    _, stored = checkpoint.read(path)
    checkpoint.refuse_other_network(path, stored["weight"], {"a": (2, 3), "b": (0,)})
    with pytest.raises(Refused, match=r"another network: a is \(2, 3\) there and \(3, 3\) here"):
        checkpoint.refuse_other_network(path, stored["weight"], {"a": (3, 3), "b": (0,)})


@pytest.fixture(scope="module")
def ema(tmp_path_factory):
    """An exported model, untrained."""
    torch.manual_seed(0)
    recipe, facts = tiny(), Facts(classes=("circle", "square", "triangle", "cross"))
    network = artifact.build(recipe, facts)
    path = tmp_path_factory.mktemp("ema") / "ema.safetensors"
    artifact.save(path, {n: p.detach() for n, p in network.named_parameters()}, recipe, facts, 96)
    return path


@pytest.fixture
def cli(tmp_path, monkeypatch, capsys):
    """The one line of a command that must be refused, run in this process and in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def line_of(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stop:
            duotone(list(arguments))
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("duotone: refused:")]
        assert stop.value.code == 2 and len(lines) == 1 and "Traceback" not in said, said
        return lines[0]

    return line_of


def test_a_command_in_a_process_of_its_own_is_refused_in_one_line(tmp_path):
    assert "nowhere does not exist" in refused("-m", "duotone.engine.cli", "sample", "nowhere", cwd=tmp_path)


def test_exports_never_overwrite(ema, tmp_path, cli):
    for form in ("diffusers", "safetensors"):
        target = tmp_path / form
        target.write_text("mine")
        assert "exists" in cli("export", str(ema), "--format", form, "--out", str(target))
        assert target.read_text() == "mine"
    (tmp_path / "sample.png").write_text("mine")
    assert "exists" in cli("sample", str(ema), "--prompt", "x")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["sample", "nowhere"], "nowhere.* does not exist"),
        (["sample"], "needs a run's folder"),
        (["paint", "x"], "unknown command 'paint'"),
        (["prepare", "imagenet"], "unknown data 'imagenet'"),
        (["export", "nowhere", "--out", "y"], "does not exist"),
        (["export", "nowhere", "--out", f"{__file__}/y"], "test_bad_input.py cannot be made"),
        (["evaluate", "nowhere", "--stepz", "3"], "nearest key is --steps"),
    ],
)
def test_commands_refuse_in_one_line(arguments, says, cli):
    assert re.search(says, cli(*arguments))


def test_files_that_are_no_models_are_refused(ema, tmp_path):
    (tmp_path / "torn.safetensors").write_bytes(ema.read_bytes()[:1000])
    with pytest.raises(Refused, match="not a readable safetensors"):
        artifact.load(tmp_path / "torn.safetensors", "cpu")
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(Refused, match="not written by duotone"):
        artifact.load(tmp_path / "other.safetensors", "cpu")


def test_the_header_tells_all_but_where_it_was_made(ema, tmp_path):
    model = artifact.load(ema, "cpu")
    assert model.images == 96 and model.facts.classes[1] == "square" and model.recipe.out is None
    header = ema.read_bytes()[8:20_000].split(b'"__metadata__"')[1][:6000]
    assert str(Path.home()).encode() not in header and os.getcwd().encode() not in header
    (tmp_path / "opened").write_bytes(b"")
    assert oct(ema.stat().st_mode & 0o777) == oct((tmp_path / "opened").stat().st_mode & 0o777)


def test_the_exported_unet_agrees_in_diffusers(ema, tmp_path):
    from diffusers import EDMEulerScheduler, UNet2DConditionModel

    model = artifact.load(ema, "cpu")
    notes = diffusers_folder.export(model, tmp_path / "folder")
    assert any("bytes" in note for note in notes)
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "folder", subfolder="unet").eval()
    scheduler = EDMEulerScheduler.from_pretrained(tmp_path / "folder", subfolder="scheduler")
    assert scheduler.config.sigma_data == model.objective.sigma_data
    x, t, tokens = torch.randn(2, 3, 16, 16), torch.rand(2) * 900, torch.randn(2, 5, 16)
    label = model.network.conditioners["label"]
    with torch.no_grad():
        ours = model.network.unet(x, t, label.embedding(torch.tensor([1, 4])), tokens)
        other = theirs(x, t, tokens, class_labels=torch.tensor([1, 4])).sample
    assert (ours - other).abs().max() <= 1e-5
    again = artifact.build(model.recipe, model.facts)
    begin_from(again, tmp_path / "folder", model.recipe.model)
    assert torch.equal(again.conditioners["label"].embedding.weight, label.embedding.weight)
    pairs = zip(again.unet.parameters(), model.network.unet.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert load_file(ema).keys() == dict(model.network.named_parameters()).keys()
