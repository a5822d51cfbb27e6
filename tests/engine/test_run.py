"""Whole runs as users start them: the real launcher, real shards, real DeepSpeed; killed, resumed, on one rank and two."""

import gc
import io
import json
import math
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused, SampleReplaced
from duotone.data.shards import Shards
from duotone.engine import artifact, checkpoint, cli, draws, outcome, pictures, run_folder, stopping
from duotone.engine.command_line import parse
from duotone.engine.commands.evaluate import shards_of
from duotone.engine.distributed import zero
from duotone.engine.recipe import Recipe
from duotone.engine.set_up import set_up, with_embedded_data
from duotone.engine.train import train
from duotone.kernels import attention_backends

RECIPE = Path(__file__).with_name("tiny_recipe.py")
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "shapes"
    captioned_shapes.write(folder, count=40, size=16, seed=0)
    return folder


def command(shards: Path, out: Path, *flags: str, ranks: int = 0, script: Path = RECIPE) -> list[str]:
    """The recipe under the launcher, or without it if `ranks` is 0."""
    run = [str(BIN / "deepspeed"), "--num_accelerators", str(ranks)] if ranks else [sys.executable]
    if ranks:
        run += ["--master_port", str(29500 + os.getpid() % 500)]
    return [*run, str(script), "--data.shards", str(shards), "--out", str(out), "--speed.threads", "1", *flags]


def run(*arguments, code: int = 0, **settings) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command(*arguments, **settings), capture_output=True, text=True, env=environment, timeout=400)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def run_here(shards: Path, out: Path, *flags: str) -> None:
    """The same within this process, for tests that do not depend on how a run is started."""
    flags = ["--data.shards", str(shards), "--out", str(out), "--speed.threads", "1", *flags]
    train(parse(Recipe, flags, default=runpy.run_path(str(RECIPE))["recipe"], name="tiny"))


def rows(out: Path, name: str = "trace.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def state(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    path, _ = checkpoint.newest(out / "checkpoints")
    return checkpoint.read(path)[1]


def assert_equal_states(a: dict, b: dict) -> None:
    for kind in checkpoint.KINDS:
        assert a[kind].keys() == b[kind].keys()
        for name in a[kind]:
            assert torch.equal(a[kind][name], b[kind][name]), f"{kind}/{name}"


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The uninterrupted run that the others are compared with."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(shards, out)
    return out


def test_a_run_leaves_what_it_promises(whole):
    metrics = rows(whole, "metrics.jsonl")
    assert [row["images"] for row in metrics] == list(range(8, 97, 8))
    wanted = {"step", "images", "loss", "grad_norm", "learning_rate", "images_per_second", "data_wait", "skipped"}
    assert all(wanted <= row.keys() for row in metrics)
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert len(list((whole / "checkpoints").iterdir())) == 2
    assert (whole / "ema.safetensors").exists() and (whole / "previews").exists()
    ema, weight = load_file(whole / "ema.safetensors"), state(whole)["weight"]
    assert ema.keys() == weight.keys() and any(not torch.equal(ema[n], weight[n]) for n in ema)
    assert all(v.dtype == torch.float32 for kind in state(whole).values() for v in kind.values())


def test_a_checkpoint_is_a_model_and_guides_a_later_one(whole, tmp_path):
    """Autoguidance works from the command line, and the last checkpoint holds what the run exported."""
    early, late = sorted((whole / "checkpoints").iterdir())
    models = {path: artifact.load(path, "cpu") for path in (early, late, whole)}
    assert [model.images for model in models.values()] == [80, 96, 96]
    ours, exported = (models[path].network.state_dict() for path in (late, whole))
    assert all(torch.equal(value, exported[name]) for name, value in ours.items())
    asked = ["--prompt", "a red circle on a blue background", "--label", "circle", "--steps", "2", "--guidance", "3"]
    pictures = []
    for name, flags in (("plain", []), ("guided", ["--guide", str(early)])):
        cli.main(["sample", str(whole), *asked, *flags, "--out", str(tmp_path / f"{name}.png")])
        pictures.append((tmp_path / f"{name}.png").read_bytes())
    assert pictures[0] != pictures[1]


@pytest.mark.parametrize("at", [pytest.param(3, marks=pytest.mark.long), 8])
def test_a_killed_run_resumes_bit_for_bit(whole, shards, tmp_path, at):
    """SIGKILL as soon as step `at` is on disk, then the same command again."""
    out = tmp_path / "killed"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    victim = subprocess.Popen(
        command(shards, out), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    )
    deadline = time.monotonic() + 200
    while not (out / "trace.jsonl").exists() or len((out / "trace.jsonl").read_text().splitlines()) < at:
        assert victim.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (out / "ema.safetensors").exists()
    done = run(shards, out)
    assert at < 2 or "resumed from" in done.stdout
    assert rows(out) == rows(whole)
    assert_equal_states(state(out), state(whole))
    assert checkpoint_counters(out) == checkpoint_counters(whole)


DYING = """
import builtins, os, runpy

left = [{n}]

def counted(real, counts=lambda *arguments: True):
    def call(*arguments, **options):
        left[0] -= bool(counts(*arguments))
        if left[0] == 0:
            os._exit(9)
        return real(*arguments, **options)
    return call

os.replace, os.fsync = counted(os.replace), counted(os.fsync)
builtins.open = counted(open, lambda path, mode="r", *_: set(mode) & set("wax+"))
runpy.run_path({recipe!r}, run_name="__main__")
"""


@pytest.mark.long
def test_a_run_that_dies_at_any_call_that_writes_goes_on(shards, tmp_path):
    """It dies before every seventh open, sync and rename that writes, from the folder's first file to the last picture."""
    flags = (
        "--images",
        "24",
        "--checkpoint.every",
        "8",
        "--checkpoint.keep",
        "1",
        "--preview.every",
        "8",
        "--preview.strips",
    )
    flags += ("--data.held-out", "0.3", "--validation.every", "8", "--validation.images", "4", "--accumulation", "1")
    run_here(shards, tmp_path / "whole", *flags)
    names = ("trace.jsonl", "validation.jsonl", "splits.json", "previews/training.gif")
    expected, died = [(tmp_path / "whole" / name).read_bytes() for name in names], True
    for n in range(1, 1000, 7):
        script, out = tmp_path / "dying.py", tmp_path / f"run-{n}"
        script.write_text(DYING.format(n=n, recipe=str(RECIPE)))
        environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        died = subprocess.run(
            command(shards, out, *flags, script=script), capture_output=True, env=environment
        ).returncode
        assert died in (0, 9)
        run_here(shards, out, *flags)
        assert [(out / name).read_bytes() for name in names] == expected, n
        assert_equal_states(state(out), state(tmp_path / "whole"))
        if not died:
            break
    assert n > 70, "that many calls write"


@pytest.mark.long
@pytest.mark.launcher
def test_two_ranks_stop_at_one_step_when_their_minutes_are_over(shards, tmp_path):
    """They stop one step after first looking at their clocks, with an ordinary checkpoint although none was due."""
    out = tmp_path / "stopped"
    done = run(shards, out, "--checkpoint.every", "0", "--checkpoint.stop-after", "0.01", ranks=2)
    assert "stopped after 0.01 minutes at 16 of 96 images: the same command resumes" in done.stdout
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["images-000000000016"]
    assert not (out / "ema.safetensors").exists()


def checkpoint_counters(out: Path) -> dict:
    path, _ = checkpoint.newest(out / "checkpoints")
    return json.loads((path / "manifest.json").read_text())["counters"]


@pytest.mark.launcher
@pytest.mark.parametrize("stage", [*(pytest.param(stage, marks=pytest.mark.long) for stage in (1, 2)), 3])
def test_two_ranks_see_what_one_rank_sees(whole, shards, tmp_path, stage):
    """The launcher starts two ranks; samples, noise and drops are the same at every position, and one rank resumes them."""
    out, memory = tmp_path / "two", set(os.listdir("/dev/shm"))
    done = run(shards, out, "--zero.stage", str(stage), ranks=2)
    left = {name for name in set(os.listdir("/dev/shm")) - memory if "deepspeed" in name}
    assert not left, "DeepSpeed's operator for inference leaves 66 MiB a rank there"
    one, two = rows(whole), rows(out)
    assert [(r["images"], r["keys"], r["draws"]) for r in two] == [(r["images"], r["keys"], r["draws"]) for r in one]
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)
    assert done.stdout.count("parameters, fp32") == 1  # only rank 0 prints
    a, b = state(out), state(whole)
    for name in a["weight"]:
        torch.testing.assert_close(a["weight"][name], b["weight"][name], rtol=2e-3, atol=2e-4)
        torch.testing.assert_close(a["ema"][name], b["ema"][name], rtol=2e-3, atol=2e-4)


@pytest.mark.launcher
def test_two_ranks_hand_over_to_one_and_back(whole, shards, tmp_path):
    """The same run on two ranks, then one, then two, each resuming from the last one's checkpoint."""
    out = tmp_path / "mixed"
    first = ["--optimizer.schedule", "constant"]
    run(shards, out, *first, "--images", "32", ranks=2)
    before = state(out)
    run_here(shards, out, *first, "--images", "32", "--zero.stage", "3")
    assert_equal_states(before, state(out))
    run_here(shards, out, *first, "--images", "64", "--zero.stage", "2")
    run(shards, out, *first, "--images", "96", "--zero.stage", "3", ranks=2)
    assert [r["keys"] for r in rows(out)] == [r["keys"] for r in rows(whole)]
    assert [r["draws"] for r in rows(out)] == [r["draws"] for r in rows(whole)]


def test_accumulation_is_the_large_batch(whole, shards, tmp_path):
    out = tmp_path / "one"
    run_here(shards, out, "--accumulation", "1")
    assert [r["loss"] for r in rows(out)] == pytest.approx([r["loss"] for r in rows(whole)], rel=1e-4)


@pytest.fixture(scope="module")
def twenty_steps(shards, tmp_path_factory):
    """20 steps in fp32, where one micro-batch and two give the same."""
    out = tmp_path_factory.mktemp("runs") / "fp32"
    run_here(shards, out, "--images", "160")
    return rows(out)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bf16_follows_fp32_with_fp32_master_weights_and_ema(twenty_steps, shards, tmp_path, accumulation, capsys):
    """20 steps in bf16: losses within 5 % of fp32's, and checkpoints hold values with more bits than bf16 has."""
    flags = ["--images", "160", "--accumulation", str(accumulation), "--speed.precision", "bf16"]
    run_here(shards, tmp_path / "bf16", *flags)
    assert ("runs as ZeRO-2" in capsys.readouterr().out) == (accumulation > 1)
    a, b = twenty_steps, rows(tmp_path / "bf16")
    assert len(b) == 20
    assert [r["loss"] for r in b] == pytest.approx([r["loss"] for r in a], rel=0.05)
    kept = state(tmp_path / "bf16")
    for kind in ("weight", "ema"):
        finer = [n for n, v in kept[kind].items() if not torch.equal(v, v.bfloat16().float())]
        assert len(finer) > 0.9 * len(kept[kind])


def test_a_compiled_network_equals_eager_without_recompiling(whole, shards, tmp_path):
    """Every block compiled with fullgraph under DeepSpeed's engine: three steps, no recompile after the second."""
    out = tmp_path / "compiled"
    flags = ["--images", "24", "--speed.compile", "True", "--optimizer.schedule", "constant"]
    done = run(shards, out, *flags)
    assert "compiled" in done.stdout
    run_here(shards, tmp_path / "eager", "--images", "24", "--optimizer.schedule", "constant")
    assert [r["loss"] for r in rows(out)] == pytest.approx([r["loss"] for r in rows(tmp_path / "eager")], rel=1e-4)
    record = json.loads((out / "record.json").read_text())
    assert record["graph_breaks"] == 0 and record["recompiles_after_step_2"] == 0


def test_a_finished_run_says_so_and_changes_nothing(whole, shards):
    before = state(whole)
    run(shards, whole)
    assert_equal_states(before, state(whole))


def test_a_run_that_goes_on_past_its_end_is_not_complete(shards, tmp_path):
    """A script that waits for ema.safetensors or loads the folder would mistake the earlier weights for new ones."""
    out, flags = tmp_path / "run", ["--optimizer.schedule", "constant"]
    run_here(shards, out, *flags, "--images", "16")
    run_here(shards, out, *flags, "--images", "96", "--checkpoint.stop-after", "1e-9")
    assert not (out / "ema.safetensors").exists()
    with pytest.raises(Refused, match="the run has not ended; give its checkpoint"):
        artifact.load(out, "cpu")
    assert artifact.load(out / "ema-before-1.safetensors", "cpu").images == 16
    with pytest.raises(Refused, match="images-000000000032 has seen more than images = 24: give --images 32 or more"):
        run_here(shards, out, *flags, "--images", "24")
    assert json.loads((out / "recipe.json").read_text())["images"] == 96
    run_here(shards, out, *flags, "--images", "40")
    assert artifact.load(out, "cpu").images == json.loads((out / "recipe.json").read_text())["images"] == 40
    assert len(list(out.glob("ema*"))) == 2


def test_a_failing_picture_costs_no_training(shards, tmp_path, monkeypatch):
    """The checkpoint that is due at the same step is written first."""

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("duotone.engine.drawing.draw", full)
    with pytest.raises(OSError, match="No space"):
        run_here(shards, tmp_path / "run", "--preview.every", "16")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["images-000000000016"]


@pytest.mark.parametrize("flags", [[], ["--fresh"]])
def test_a_folder_in_use_is_refused_and_left_as_it_is(whole, shards, tmp_path, flags):
    out = shutil.copytree(whole, tmp_path / "used")
    with run_folder.claimed(out), pytest.raises(Refused, match="used is in use by process"):
        run_here(shards, out, *flags)
    assert rows(out) == rows(whole) and [path.name for path in tmp_path.iterdir()] == ["used"]
    run_here(shards, out, *flags)


def test_a_resumed_run_goes_by_the_clock_of_the_first(shards, tmp_path, monkeypatch):
    """It keeps the attention backends that the first start measured, whatever a later measurement would say."""
    shape = {
        "images": 8,
        "queries": 4096,
        "keys": 4096,
        "heads": 4,
        "width": 8,
        "dtype": torch.float32,
        "masked": False,
    }
    out, flags = tmp_path / "run", ["--optimizer.schedule", "constant"]
    monkeypatch.setattr("duotone.kernels.attention_backends._choices", {})
    attention_backends.choose("flash", **shape)
    run_here(shards, out, *flags, "--images", "8")
    monkeypatch.setattr("duotone.kernels.attention_backends._choices", {})
    run_here(shards, out, *flags, "--images", "16")
    (choice,) = json.loads((out / "record.json").read_text())["attention_choices"]
    assert (choice["queries"], choice["backend"]) == (4096, "flash")


def test_a_resumed_run_does_not_ask_for_the_weights_it_began_from(whole, shards, tmp_path):
    source, out = shutil.copytree(whole, tmp_path / "source"), tmp_path / "run"
    flags = ["--start", str(source), "--optimizer.schedule", "constant"]
    run_here(shards, out, *flags, "--images", "16")
    shutil.rmtree(source)
    run_here(shards, out, *flags, "--images", "32")
    assert [row["images"] for row in rows(out)] == [8, 16, 24, 32]


ENDING = """
import atexit, pathlib, sys

def compiler():
    loaded = [name for name in ("compile_fx", "select_algorithm") if f"torch._inductor.{name}" in sys.modules]
    print(f"compiler loaded: {loaded}", flush=True)

def gloo():  # runs after the end of all that registers later
    names = [(task / "comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
    left = [name for name in names if "gloo" in name]
    print(f"{len(left)} threads of gloo at the end", flush=True)

atexit.register(gloo)
atexit.register(compiler)
"""
REFUSING = """
import importlib, os, runpy
from duotone.data.refusal import Refused
seen = importlib.import_module("duotone.engine.{module}")
real, calls = seen.{name}, []

def refusing(*arguments, **options):
    calls.append(1)
    if os.environ["RANK"] == "{rank}" and len(calls) == {call}:
        raise Refused("nothing is right here")
    return real(*arguments, **options)

seen.{name} = refusing
runpy.run_path({recipe!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param(0, id="without a launcher"),
        pytest.param(2, id="two ranks", marks=[pytest.mark.launcher, pytest.mark.long]),
    ],
)
def test_no_thread_of_gloo_outlives_the_run_and_no_compiler_was_loaded(shards, tmp_path, ranks):
    """A Gloo thread that frees a tensor while Python shuts down aborts the process: good runs would exit with 134."""
    script = tmp_path / "ending.py"
    script.write_text(f"{ENDING}\nimport runpy\nrunpy.run_path({str(RECIPE)!r}, run_name='__main__')\n")
    # DALI collects garbage when Python ends, which would hide objects held in a cycle.
    flags = ("--images", "8", "--data.decoder", "pillow")
    done = run(shards, tmp_path / "run", *flags, ranks=ranks, script=script)
    assert ends(done) == ["0 threads of gloo at the end"] * (ranks or 1)
    assert done.stdout.count("compiler loaded: []") == (ranks or 1), "a second of every start that does not compile"


def ends(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stdout.splitlines() if line.endswith("threads of gloo at the end")]


@pytest.mark.launcher
@pytest.mark.parametrize(
    "module,name,rank,call,says",
    [
        pytest.param("train", "train_step", 1, 3, "duotone: refused on rank 1 (", id="one rank in the middle"),
        pytest.param(
            *("set_up", "with_embedded_data", 0, 1, "duotone: refused: "),
            id="rank 0 before the others",
            marks=pytest.mark.long,
        ),
    ],
)
def test_what_a_rank_refuses_is_the_only_thing_heard(shards, tmp_path, module, name, rank, call, says):
    """No traceback of the other ranks, which lose their connection: one line, and exit code 2."""
    script = tmp_path / "refusing.py"
    script.write_text(ENDING + REFUSING.format(module=module, name=name, rank=rank, call=call, recipe=str(RECIPE)))
    done = run(shards, tmp_path / "run", ranks=2, script=script, code=2)
    lines = [line for line in done.stderr.splitlines() if "refused" in line]
    assert len(lines) == 1 and lines[0].startswith(says) and lines[0].endswith("nothing is right here")
    assert "Traceback" not in done.stderr + done.stdout
    assert ends(done) == ["0 threads of gloo at the end"], "of the rank that refuses; the launcher kills the other"


def test_what_a_run_trained_is_freed_with_it(shards, tmp_path):
    """So that a second run in the same process can use the memory of the first."""
    flags = ["--data.shards", str(shards), "--out", str(tmp_path / "run"), "--speed.threads", "1"]
    recipe = parse(Recipe, flags, default=runpy.run_path(str(RECIPE))["recipe"], name="tiny")
    with ExitStack() as held:
        held.push(zero.leave)
        network = weakref.ref(set_up(recipe, held).network)
    gc.collect()
    assert network() is None


def test_samples_that_could_not_be_read_stay_in_the_record(shards, tmp_path):
    """From all that the run has read, including before a resume, and also after a finished run is started again."""
    folder, out = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "run"
    data = Shards(shards=folder, size=16).open(torch.device("cpu"))
    data.close()
    (tar,) = folder.glob("*.tar")
    stat, raw = tar.stat(), bytearray(tar.read_bytes())
    raw[int(data.columns["image_offset"][3]) + 50] ^= 1
    tar.write_bytes(raw)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    for images, told in (("40", 1), ("48", 0), ("48", 0)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run_here(folder, out, "--data.on-bad", "replace", "--optimizer.schedule", "constant", "--images", images)
        assert sum(w.category is SampleReplaced for w in caught) == told
        (line,) = json.loads((out / "record.json").read_text())["unread_samples"]
        assert "checksum" in line and str(tar) in line


@pytest.mark.parametrize("fault", ["a caption that is no text", "no caption beside no image"])
def test_previews_ask_for_captions_of_what_can_be_read(fault, tmp_path):
    """If unreadable samples are replaced, one among the first must not stop the run."""
    folder = tmp_path / "shards"
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for i in range(16):
            encoded = io.BytesIO()
            Image.new("RGB", (16, 16), (15 * i, 100, 255 - 15 * i)).save(encoded, "PNG")
            members = {"png": encoded.getvalue(), "txt": f"picture {i}".encode()}
            if i == 1:
                members = (
                    {"png": members["png"], "txt": b"pic\0ture"} if "text" in fault else {"png": members["png"][:20]}
                )
            for ending, content in members.items():
                info = tarfile.TarInfo(f"{i:04d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    base = runpy.run_path(str(RECIPE))["recipe"]
    base = replace(base, conditioning=base.conditioning[:1])
    flags = ["--data.shards", str(folder), "--out", str(tmp_path / "run"), "--speed.threads", "1"]
    flags += ["--data.on-bad", "replace", "--images", "16", "--checkpoint.every", "0"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SampleReplaced)
        train(parse(Recipe, flags, default=base, name="tiny"))
    assert [row["images"] for row in rows(tmp_path / "run")] == [8, 16]


def test_a_run_reads_from_where_it_stood_when_it_was_asked(whole, shards, tmp_path, monkeypatch):
    """The reading thread may start only after the first step has advanced the position."""
    late, batches = tmp_path / "late", type(Shards(shards=shards, size=16).open(torch.device("cpu"))).batches

    def begin_late(self, plans, ahead=2):
        def waited():
            time.sleep(0.3)
            yield from plans

        return batches(self, waited(), ahead)

    monkeypatch.setattr("duotone.data.dataset.Dataset.batches", begin_late)
    run_here(shards, late, "--images", "16", "--optimizer.schedule", "constant", "--checkpoint.every", "0")
    assert [r["keys"] for r in rows(late)] == [r["keys"] for r in rows(whole)[:2]]


def test_a_sample_that_cannot_be_read_loses_no_step_before_it(shards, tmp_path):
    """The run ends with a checkpoint of those steps, and the remedy in its message works."""
    folder, out = shutil.copytree(shards, tmp_path / "shards"), tmp_path / "run"
    recipe = runpy.run_path(str(RECIPE))["recipe"]
    data = Shards(shards=folder, size=16).open(torch.device("cpu"))
    data.close()
    (sample,) = draws.plan(recipe.seed, np.array([20]), data.count).samples_N
    (tar,) = folder.glob("*.tar")
    stat, raw = tar.stat(), bytearray(tar.read_bytes())
    raw[int(data.columns["image_offset"][sample]) + 50] ^= 1
    tar.write_bytes(raw)
    os.utime(tar, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    flags = ["--checkpoint.every", "0", "--images", "32"]
    with pytest.raises(Refused, match="--data.on-bad replace"):
        run_here(folder, out, *flags)
    assert checkpoint.newest(out / "checkpoints")[0].name == checkpoint.name_of(16)
    with pytest.warns(SampleReplaced):
        run_here(folder, out, *flags, "--data.on-bad", "replace")
    assert [row["images"] for row in rows(out)] == [8, 16, 24, 32]


def test_a_run_tells_how_each_part_of_it_was_trained(shards, tmp_path, capsys):
    out, flags = tmp_path / "run", ["--optimizer.schedule", "constant", "--data.decoder", "pillow"]
    run_here(shards, out, *flags, "--images", "16")
    assert "resumes with other settings" not in capsys.readouterr().out
    run_here(shards, out, *flags, "--images", "24", "--speed.precision", "bf16")
    assert (
        "resumes with other settings than before: precision fp32 until here, bf16 from here on"
        in capsys.readouterr().out
    )
    told = (out / "record.json").read_text()
    parts = json.loads(told)["parts"]
    assert [(part["images"], part["precision"]) for part in parts] == [([0, 16], "fp32"), ([16, 24], "bf16")]
    run_here(shards, out, *flags, "--images", "24")
    assert (out / "record.json").read_text() == told, "a look at a finished run trains nothing"


def test_a_picture_that_was_half_written_stops_nothing(whole, shards, tmp_path, monkeypatch):
    """Left by a killed process or a faulty disk. A run itself writes pictures whole or not at all."""
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "previews" / "images-000000000016.png").write_bytes(b"\x89PNG\r\n")
    (out / "previews" / "images-000000000024.png").write_bytes(b"")
    run_here(shards, out)
    monkeypatch.setattr(Image.Image, "save", lambda self, file, **_: Path(file).write_bytes(b"half") and 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pictures.write(tmp_path / "sheet.png", Image.new("RGB", (2, 2)))
    assert not list(tmp_path.glob("*sheet*"))


def test_splits_are_told_again_until_they_are_trained_on(shards, tmp_path):
    """Until the first checkpoint, the data may still grow."""
    out = tmp_path / "run"
    run_here(shards, out, "--data.held-out", "0.3", "--images", "16")
    told = (out / "splits.json").read_text()
    shutil.rmtree(out / "checkpoints")
    (out / "splits.json").write_text("{}")
    run_here(shards, out, "--data.held-out", "0.3", "--images", "16")
    assert (out / "splits.json").read_text() == told


def test_the_folder_names_the_data_that_was_trained_on(shards, tmp_path):
    """`duotone evaluate` reads it; until the first checkpoint, an earlier start may have named other data."""
    out, other = tmp_path / "run", tmp_path / "other"
    captioned_shapes.write(other, count=24, size=16, seed=1)
    run_here(other, out, "--images", "16")
    shutil.rmtree(out / "checkpoints")
    run_here(shards, out, "--images", "16")
    assert shards_of(out) == shards
    with pytest.raises(Refused, match="was trained on other data"):
        run_here(other, out, "--images", "16")
    assert shards_of(out) == shards


def test_two_first_runs_at_once_share_the_embedded_data(tmp_path, monkeypatch):
    write = captioned_shapes.write

    def late(folder, **settings):
        write(folder, **settings | {"count": 8})  # the other run has written it first
        raise Refused("writing failed (Directory not empty)")

    monkeypatch.setattr(captioned_shapes, "write", late)
    recipe = replace(runpy.run_path(str(RECIPE))["recipe"], out=tmp_path / "run")
    assert with_embedded_data(recipe).data.shards == tmp_path / "captioned_shapes-16px"


def test_sigma_data_is_measured_once_in_a_run(shards, tmp_path, monkeypatch):
    """Another decoder rounds differently, but a resumed run keeps the objective that it began with."""
    flags = ["--objective.sigma-data", "None", "--optimizer.schedule", "constant"]
    run_here(shards, tmp_path / "run", *flags, "--images", "16")
    before = artifact.load(tmp_path / "run", "cpu").objective
    monkeypatch.setattr("duotone.engine.objectives.edm.measured_sigma_data", lambda data: 1 / 0)
    run_here(shards, tmp_path / "run", *flags, "--images", "24")
    assert artifact.load(tmp_path / "run", "cpu").objective == before and 0.3 < before.sigma_data < 1


def test_fresh_moves_the_folder_one_stands_in_aside(whole, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(shutil.copytree(whole, tmp_path / "again"))
    run_here(shards, Path("."), "--images", "16", "--fresh")
    assert rows(tmp_path / "again-before-1") == rows(whole)
    assert rows(tmp_path / "again")[-1]["images"] == 16
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "again-before-1"]


@pytest.mark.parametrize("there", [False, True], ids=["new", "to be gone on with"])
def test_a_folder_that_another_process_takes_meanwhile_is_refused(whole, shards, tmp_path, monkeypatch, there):
    """Between reading a folder and claiming it, the ranks meet and shards are indexed, which takes time."""
    out, join = tmp_path / "run", zero.join
    if there:
        shutil.copytree(whole, out)

    def slow(device):
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        (out / "recipe.json").write_text('{"seed": 7}')
        return join(device)

    monkeypatch.setattr(zero, "join", slow)
    with pytest.raises(Refused, match="another process began a run there"):
        run_here(shards, out)
    assert sorted(path.name for path in out.iterdir()) == [".claim", "recipe.json"]


def test_what_was_due_with_the_checkpoint_is_made_up_for(shards, tmp_path, monkeypatch):
    """A checkpoint is written before its step's pictures and losses: if a run ends between, a resume fills the gap."""
    flags = ["--images", "48", "--preview.every", "16", "--validation.every", "16", "--data.held-out", "0.3"]
    flags += ["--validation.images", "4", "--validation.levels", "2", "--checkpoint.every", "16"]
    draw = outcome.draw

    def failing(run, model):
        if run.images == 32:
            raise OSError("no space left")
        return draw(run, model)

    monkeypatch.setattr(outcome, "draw", failing)
    with pytest.raises(OSError, match="no space left"):
        run_here(shards, tmp_path / "run", *flags)
    assert [row["images"] for row in rows(tmp_path / "run", "validation.jsonl")] == [16]
    monkeypatch.undo()
    run_here(shards, tmp_path / "run", *flags)
    assert [row["images"] for row in rows(tmp_path / "run", "validation.jsonl")] == [16, 32, 48]
    grids = sorted(path.name for path in (tmp_path / "run" / "previews").glob("images-*.png"))
    assert grids == [f"{checkpoint.name_of(n)}.png" for n in (16, 32, 48)]


def test_a_disk_that_is_full_is_one_line(shards, tmp_path):
    script = tmp_path / "full.py"
    limit = "import resource, runpy\nresource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
    script.write_text(f"{limit}runpy.run_path({str(RECIPE)!r}, run_name='__main__')\n")
    done = run(shards, tmp_path / "run", script=script, code=2)
    (line,) = (line for line in done.stderr.splitlines() if "refused" in line)
    assert "images-000000000016 cannot be written" in line and "Traceback" not in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


ENDLESS = ("--optimizer.schedule", "constant", "--images", "800000", "--checkpoint.every", "0", "--preview.every", "0")


def begun(shards: Path, out: Path, **settings) -> subprocess.Popen:
    """Starts a run as in its own terminal, and returns it after a few steps."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}

    def as_in_a_terminal():  # background jobs of a shell ignore Ctrl-C, and so would their children
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.setsid()

    start, pipes = command(shards, out, *ENDLESS, **settings), {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = subprocess.Popen(start, **pipes, text=True, env=environment, preexec_fn=as_in_a_terminal)
    until = time.monotonic() + 200
    while not (out / "trace.jsonl").exists() or len(rows(out)) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    return process


def said_at_the_end(process: subprocess.Popen) -> str:
    """The output of all processes that write to its pipe, after the last of them has ended."""
    try:
        return process.communicate(timeout=200)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_a_signal_ends_a_run_with_a_checkpoint(shards, tmp_path):
    """No checkpoint was due; it holds every step that was taken, and the same command resumes from it."""
    process = begun(shards, tmp_path / "run")
    while (
        process.poll() is None
    ):  # a batch queue may repeat the signal, and the launcher does, also while the checkpoint is written
        process.send_signal(signal.SIGTERM)
        time.sleep(0.01)
    said = said_at_the_end(process)
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert process.returncode == 143 and "Traceback" not in said
    assert f"duotone: interrupted: the same command resumes from {written}" in said
    last = rows(tmp_path / "run")[-1]["images"]
    assert written.name == checkpoint.name_of(last)
    run_here(shards, tmp_path / "run", *ENDLESS, "--images", str(last + 8))
    assert [row["images"] for row in rows(tmp_path / "run")] == list(range(8, last + 9, 8))


@pytest.mark.launcher
@pytest.mark.parametrize("to", ["all", pytest.param("rank 1", marks=pytest.mark.long)])
def test_a_signal_ends_two_ranks_after_one_step(shards, tmp_path, to):
    """Ctrl-C reaches all processes of a terminal, then the launcher sends SIGTERM; a queue may signal one rank."""
    process = begun(shards, tmp_path / "run", ranks=2)
    if to == "all":
        os.killpg(process.pid, signal.SIGINT)
    else:
        others = psutil.Process(process.pid).children(recursive=True)
        next(p for p in others if "--local_rank=1" in p.cmdline()).send_signal(signal.SIGTERM)
    said = said_at_the_end(process)
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert said.count(f"duotone: interrupted: the same command resumes from {written}") == 1
    assert written.name == checkpoint.name_of(rows(tmp_path / "run")[-1]["images"])
    assert ("stopping with a checkpoint" in said) == (to == "all")  # rank 0 reports a signal that it got itself


def test_a_run_that_nobody_listens_to_any_more_writes_its_checkpoint(shards, tmp_path):
    """As in `... | tee log`, where Ctrl-C ends tee first."""
    process = begun(shards, tmp_path / "run")
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    process.wait(200)
    (written,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert checkpoint.verify(written) is None and process.returncode in (
        130,
        120,
    )  # 120: Python could not flush its output


def test_a_signal_within_the_last_save_loses_nothing(shards, tmp_path, monkeypatch):
    publish = checkpoint.publish

    def interrupted(folder, images, *rest):
        if images == 24:
            signal.raise_signal(signal.SIGINT)
        return publish(folder, images, *rest)

    monkeypatch.setattr(checkpoint, "publish", interrupted)
    run_here(shards, tmp_path / "run", "--images", "24", "--checkpoint.every", "0")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [checkpoint.name_of(24)]
    assert (tmp_path / "run" / "ema.safetensors").exists()


@pytest.mark.parametrize("ended", ["by a signal", "by its minutes"])
def test_who_ends_a_run_does_not_wait_for_its_pictures(ended, shards, tmp_path, monkeypatch):
    """The checkpoint is written at once, the pictures are drawn when the run is resumed."""
    module, out = sys.modules["duotone.engine.train"], tmp_path / "run"
    real = module.train_step
    flags = ["--preview.every", "24", "--checkpoint.every", "0", "--images", "48"]

    def ending(run, batches):
        real(run, batches)
        if run.images == 24 and ended == "by a signal":
            signal.raise_signal(signal.SIGTERM)
        elif run.images == 24:
            patch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: math.inf))

    ours = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(module, "train_step", ending)
        if ended == "by a signal":
            with pytest.raises(stopping.Interrupted):
                run_here(shards, out, *flags)
            signal.signal(signal.SIGTERM, ours)
        else:
            run_here(shards, out, *flags, "--checkpoint.stop-after", "1000")
    assert [path.name for path in (out / "checkpoints").iterdir()] == [checkpoint.name_of(24)]
    assert not (out / "previews").exists()
    run_here(shards, out, *flags)
    assert (out / "previews" / f"{checkpoint.name_of(24)}.png").exists()


@pytest.mark.parametrize("ends", [True, False], ids=["with a checkpoint", "complete"])
def test_a_second_sigterm_takes_no_exit_code(ends):
    """While a run ends with a checkpoint, the second is ignored; a run that is complete all the same ends at once."""
    ours = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with stopping.Stop(0, 0, torch.device("cpu")) as stop:
            signal.raise_signal(signal.SIGTERM)
            if ends:
                stop.ends_the_process()
        assert (signal.getsignal(signal.SIGTERM) is signal.SIG_DFL) != ends
        if ends:
            signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, ours)


def test_a_second_ctrl_c_does_not_wait():
    """Such as while pictures are drawn. The launcher's SIGTERM after a Ctrl-C does not count as a second one."""
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl-C
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    with pytest.raises(KeyboardInterrupt), stopping.Stop(0, 0, torch.device("cpu")) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.heard == signal.SIGINT
        signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    signal.signal(signal.SIGINT, ours)


def test_a_run_that_has_not_ended_names_its_checkpoint(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "run")
    (out / "ema.safetensors").unlink()
    with pytest.raises(Refused, match="the run has not ended; give its checkpoint .*images-000000000096$"):
        artifact.load(out, "cpu")


def test_fresh_moves_the_old_run_aside(whole, shards, tmp_path):
    out = shutil.copytree(whole, tmp_path / "again")
    run_here(shards, out, "--images", "24", "--fresh")
    assert rows(out)[-1]["images"] == 24
    assert rows(tmp_path / "again-before-1") == rows(whole)


def test_gradient_checkpointing_and_trackers(whole, shards, tmp_path):
    """Recomputed activations change no loss; TensorBoard and offline wandb only receive what is logged."""
    out = tmp_path / "listened"
    pictures = ("--preview.every", "48", "--preview.strips", "--log.wandb-pictures")
    run(shards, out, "--speed.gradient-checkpointing", "--log.tensorboard", "--log.wandb", *pictures)
    assert [r["loss"] for r in rows(out)] == pytest.approx([r["loss"] for r in rows(whole)], rel=1e-6)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["images"]) == {"samples", "conditional", "unconditional"}
    assert [event.step for event in events.Images("samples")] == [48, 96] and "loss" in events.Tags()["scalars"]
    sent = sorted(path.name.split("_")[0] for path in (out / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert sent == ["conditional"] * 2 + ["samples"] * 2 + ["unconditional"] * 2
    (followed,) = (out / "wandb").glob("offline-run-*/run-*.wandb")
    told = followed.read_bytes()
    assert b"grad_norm" in told and b"batch_size" in told
    for unasked in (b"fused kernels at", b"--log.wandb", RECIPE.name.encode(), b"safetensors=="):
        assert unasked not in told, "only numbers and the recipe are sent"
    assert len((out / "wandb_id").read_text()) == 9, "a later start goes on under it, and no other run has it"
