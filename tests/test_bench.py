"""Every bench in its shortest real form on a CPU: what it writes, what it refuses, and that it imports only what it needs."""

import importlib
import json
import os
import runpy
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel

from duotone.data.prepare.idx import PrepareIdx
from duotone.data.whole_file import write_json
from duotone.engine.command_line import parse
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import to_json
from duotone.engine.small import small_text

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def bench(monkeypatch, capsys):
    """Runs a bench in this process: `bench(name, *flags)` gives its exit code, output and error lines."""
    monkeypatch.syspath_prepend(str(BENCH))

    def run(name: str, *flags) -> tuple[int, str, list[str]]:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, flags)])
        code = 0
        try:
            importlib.import_module(name).main()
        except SystemExit as stop:
            code = stop.code or 0
        shown = capsys.readouterr()
        return code, shown.out, shown.err.splitlines()

    return run


def result(path: Path) -> dict:
    return json.loads(path.read_text())


def tiny_unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


# ---------------------------------------------------------------------------------------------------- the training step


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """One run of the step's bench on the tiny text network, as a user starts it."""
    path = tmp_path_factory.mktemp("step") / "step.json"
    # With fewer images, the weights' gradients, whose layout is changed, would outweigh them.
    flags = ["--unet", "tiny", "--steps", "2", "--batch", "8", "--json", str(path)]
    command = [sys.executable, str(BENCH / "train_step.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stderr
    return path


def test_the_step_is_counted_before_and_after_fuse(step):
    before, after = result(step)["contenders"].values()
    for counted in (before["counted"], after["counted"]):
        assert counted["operators"] > 100 and counted["megabytes_per_image"] > 1
    assert after["compiler"] == {"graphs": 1, "graph_breaks": 0}
    before, after = result(step)["as_on_a_gpu"]["counts"].values()
    assert after["operators"] < before["operators"]
    assert after["megabytes_per_image"] < before["megabytes_per_image"]


def test_the_step_learns_the_same_both_ways(step):
    found = result(step)
    assert found["largest_loss_difference"] < 1e-5
    assert step.with_suffix(".png").stat().st_size > 5000
    for row in found["contenders"].values():
        assert len(row["losses"]) == 4 and row["milliseconds"] > 0 and 0 < row["share_of_matmul_rate"] < 2
        assert abs(sum(row["shares"].values()) - 1) < 0.01 and row["shares"]["convolution"] > 0
    assert found["machine"]["commit"] and found["load_average"]


def test_a_folder_of_ones_own_is_measured(bench, tmp_path):
    tiny_unet().save_pretrained(tmp_path / "unet")
    flags = ("--unet", tmp_path / "unet", "--steps", 1, "--batch", 2, "--json", tmp_path / "out.json")
    code, out, _ = bench("train_step", *flags)
    assert code == 0 and "fused eager" in out
    assert result(tmp_path / "out.json")["size"] == 8


def broken(folder: Path, how: str) -> Path:
    if how == "absent":
        return folder / "nowhere"
    tiny_unet().save_pretrained(folder)
    weights = folder / "diffusion_pytorch_model.safetensors"
    if how == "no json":
        (folder / "config.json").write_text("{")
    elif how == "another class":
        (folder / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    elif how == "cut weights":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif how == "no weights":
        weights.unlink()
    elif how == "other weights":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"block_out_channels": [16, 16]}))
    return folder


BROKEN = ["absent", "no json", "another class", "cut weights", "no weights", "other weights"]


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_folder_is_refused_in_one_line(how, bench, tmp_path):
    folder = broken(tmp_path / "unet", how)
    code, out, errors = bench("train_step", "--unet", folder)
    assert code == 2 and not out
    assert len(errors) == 1 and errors[0].startswith(f"duotone: refused: {folder}"), errors


@pytest.mark.parametrize("value", [-1, 0])
@pytest.mark.parametrize("flag", ["--steps", "--batch", "--size"])
def test_a_number_out_of_range_is_refused(flag, value, bench):
    code, _, errors = bench("train_step", "--unet", "tiny", flag, value)
    assert code == 2 and len(errors) == 1 and flag in errors[0]


@pytest.mark.parametrize("script, flag", [("sampling", "--steps"), ("sampling", "--batch"), ("switches", "--batch")])
def test_nothing_of_something_is_refused(script, flag, bench):
    code, _, errors = bench(script, flag, 0)
    assert code == 2 and len(errors) == 1 and flag in errors[0]


@pytest.mark.parametrize("flag", ["--rounds", "--batch", "--size", "--shapes"])
def test_no_convolutions_are_refused(flag, bench):
    code, _, errors = bench("conv", "--network", "tiny", flag, 0)
    assert code == 2 and len(errors) == 1 and flag in errors[0]


@pytest.mark.long
def test_a_race_ends_with_its_minutes(bench, tmp_path):
    code, _, errors = bench(
        "train_step", "--unet", "tiny", "--size", 8, "--minutes", 0, "--json", tmp_path / "out.json"
    )
    assert code == 0, errors
    rows = json.loads((tmp_path / "out.json").read_text())["contenders"]
    assert {row["timed_steps"] for row in rows.values()} == {5}


# ---------------------------------------------------------------------------------------------- a run beside the notebook


def run_by_epochs(folder: Path, names: str, losses: list[float]) -> Path:
    """A run of batches of 2 on 10 images, with one line of metrics.jsonl per batch."""
    for name in ("shards", "run"):
        (folder / name).mkdir()
    write_json(folder / "shards" / "dataset.json", {"count": 10, "about": {"names": names}})
    recipe = replace(small_text, data=replace(small_text.data, shards=folder / "shards"), batch_size=2)
    write_json(folder / "run" / "recipe.json", to_json(recipe))
    lines = [json.dumps({"images": 2 * number, "loss": loss}) for number, loss in enumerate(losses, 1)]
    (folder / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "run"


@pytest.mark.parametrize("names, notebook", [("mnist", [0.0525, 0.0460]), ("fashion-mnist", [])])
def test_losses_of_a_run_stand_beside_the_notebooks_on_mnist_alone(names, notebook, bench, tmp_path, monkeypatch):
    """Only whole epochs count, and only the last batches of each."""
    run = run_by_epochs(tmp_path, names, [9, 9, 1, 2, 3, 9, 9, 2, 4, 6, 9, 9, 9])
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("notebook_losses"), "BATCHES", 3)
    code, out, errors = bench("notebook_losses", run, "--json", tmp_path / "out.json")
    assert code == 0, errors
    rows = result(tmp_path / "out.json")["epochs"]
    assert [(row["epoch"], row["loss"], row["batches"]) for row in rows] == [(1, 2.0, 3), (2, 4.0, 3)]
    assert rows[0]["half_95"] == pytest.approx(1.96 / 3**0.5)
    assert [row["notebook"] for row in rows if "notebook" in row] == notebook


@pytest.mark.parametrize("flags, said", [([], "no epoch of 10"), (["--epoch", "0"], "--epoch 0")])
def test_a_run_shorter_than_an_epoch_is_refused(flags, said, bench, tmp_path):
    code, _, errors = bench("notebook_losses", run_by_epochs(tmp_path, "mnist", [1.0]), *flags)
    assert code == 2 and len(errors) == 1 and said in errors[0]


def test_what_is_no_run_is_refused(bench, tmp_path):
    code, _, errors = bench("notebook_losses", tmp_path)
    assert code == 2 and len(errors) == 1 and "not a run's folder" in errors[0]


# ---------------------------------------------------------------------------------------------- convolutions, sampling


def test_a_convolution_is_timed_each_way(bench, tmp_path):
    path = tmp_path / "conv.json"
    code, out, _ = bench("conv", "--network", "tiny", "--shapes", 1, "--rounds", 1, "--json", path)
    found = result(path)
    assert code == 0 and "of matmul rate" in out and found["ways"][:2] == ["planes", "channels-last"]
    assert [choice["pass"] for choice in found["choices"]] == ["forward", "data gradient", "weight gradient"]
    assert all(total["ratio"] >= 1 for total in found["totals"].values())


def test_shapes_of_convolutions_are_those_of_the_network(bench, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    conv, networks = importlib.import_module("conv"), importlib.import_module("networks")
    found = conv.shapes_of("tiny", 16, 2)
    layers = [m for m in networks.TINY.build().modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert sum(number for shape, number in found.items() if shape.kernel == 3) == len(layers)
    assert all(shape.images == 2 for shape in found)
    # The heaviest is the one after the upsampling: 32 channels to 32 at full resolution.
    assert max(shape.flops for shape in found) == 2 * 2 * 16 * 16 * 32 * 32 * 9


def test_exact_savings_of_sampling_give_the_oracles_picture(bench, tmp_path):
    path = tmp_path / "sampling.json"
    flags = ("--network", "tiny", "--batch", 2, "--steps", 4, "--rounds", 1, "--json", path)
    assert bench("sampling", *flags)[0] == 0
    rows = {row["way"]: row for row in result(path)["results"]}
    assert all(
        row["largest_pixel_difference"] < 0.5 for row in rows.values() if row["largest_pixel_difference"] is not None
    )
    forwards = [row["forwards_per_evaluation"] for row in rows.values()]
    assert forwards[:3] == [2, 2, 2] and 1 < forwards[3] < 2 and 1 <= forwards[4] < forwards[3] and forwards[5] == 1


def test_no_images_are_refused(bench):
    code, _, errors = bench("gpu_code", "--images", 0)
    assert code == 2 and len(errors) == 1 and "--images 0" in errors[0]


@pytest.mark.parametrize(
    "script, flags",
    [
        ("conv", ["--network", "tiny"]),
        ("switches", ["--network", "tiny"]),
        ("ceilings", []),
        ("sampling", ["--network", "tiny"]),
        ("throughput", ["--kernel", "guided_step"]),
        ("train_step", ["--unet", "tiny"]),
        ("loader", []),
        ("ledger", []),
        ("optimizers", ["--scratch", "nowhere"]),
        ("gpu_code", []),
    ],
)
def test_a_result_that_cannot_be_written_is_refused_before_anything_is_measured(script, flags, bench, tmp_path):
    (tmp_path / "file").write_text("kept")
    for path in (tmp_path / "file" / "out.json", tmp_path):
        code, out, errors = bench(script, *flags, "--json", path)
        assert code == 2 and not out and len(errors) == 1 and f"refused: {path} cannot be written" in errors[0]
    assert [found.name for found in tmp_path.iterdir()] == ["file"] and (tmp_path / "file").read_text() == "kept"


def test_a_result_that_stands_there_stays_until_something_is_measured(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    refuse_unwritable = importlib.import_module("record").refuse_unwritable
    for path, text in ((tmp_path / "old.json", "old"), (tmp_path / "a" / "new.json", None)):
        if text:
            path.write_text(text)
        refuse_unwritable(path)
        assert path.read_text() == text if text else not path.exists()


@pytest.mark.parametrize("interval", [(3, 0.3), (-1, 2), (1, 1)])
def test_an_interval_that_does_not_rise_is_refused(interval, bench):
    code, out, errors = bench("sampling", "--network", "tiny", "--interval", *interval)
    assert code == 2 and not out and len(errors) == 1 and f"--interval {interval[0]:g} {interval[1]:g}" in errors[0]


@pytest.mark.parametrize("flag", ["--quality", "--confirm"])
def test_quality_without_a_run_is_refused(bench, flag):
    code, _, errors = bench("sampling", flag)
    assert code == 2 and len(errors) == 1 and "--run" in errors[0]
    code, _, errors = bench("sampling", "--run", "nowhere")
    assert code == 2 and len(errors) == 1 and "nowhere" in errors[0]


def test_the_cheapest_interval_that_is_as_good(bench, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    verdict = importlib.import_module("sampling").verdict
    unguided, everywhere, narrow, worse = (
        {"colour_and_background": right, "forwards_per_evaluation": forwards}
        for right, forwards in ((0.5, 1.0), (0.9, 1.9), (0.9, 1.3), (0.8, 1.1))
    )
    found = verdict([unguided, everywhere, narrow, worse])
    assert found["cheapest_as_good"] is narrow and found["holds"]
    assert not verdict([unguided, everywhere, worse])["holds"]


def test_switches_are_moved_one_at_a_time(bench, tmp_path):
    path = tmp_path / "switches.json"
    assert bench("switches", "--network", "tiny", "--batch", 2, "--rounds", 1, "--json", path)[0] == 0
    rows = {row["switch"]: row for row in result(path)["results"]}
    kept = {name: row["saved_mebibytes"] for name, row in rows.items() if row["milliseconds"] is not None}
    assert kept["speed.gradient_checkpointing = True"] < kept["speed.precision = bf16"] < kept["as chosen"]


# --------------------------------------------------------------------------------------------------------- counters


def test_bytes_and_layouts_are_counted(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    counters = importlib.import_module("counters")
    x_NCHW = torch.zeros(2, 4, 8, 8)
    with counters.Counting() as counting:
        last = x_NCHW.contiguous(memory_format=torch.channels_last)
        (last + 1).permute(0, 2, 3, 1).flatten(1, 2)
    counts = counting.counts
    assert counts.operators == 2 and counts.bytes == 4 * x_NCHW.nbytes
    assert counts.layout_changes == 1 and counts.layout_bytes == 2 * x_NCHW.nbytes


@pytest.mark.parametrize(
    "operator,group",
    [
        ("aten::convolution_backward", "convolution"),
        ("duotone::group_norm_silu", "norm"),
        ("aten::_scaled_dot_product_flash_attention", "attention"),
        ("aten::_fused_adamw_", "optimizer"),
        ("aten::addmm", "linear"),
        ("aten::cat", "other"),
    ],
)
def test_operators_belong_to_parts_of_a_step(operator, group, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    assert importlib.import_module("counters").group_of(operator) == group


# ---------------------------------------------------------------------------------------------------------- GPU day


def test_a_gpu_day_without_a_gpu_is_refused(bench):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    code, out, errors = bench("gpu_day")
    assert code == 2 and not out and len(errors) == 1 and "no CUDA device" in errors[0]


def test_an_unknown_stage_is_refused(bench):
    code, _, errors = bench("gpu_day", "--only", "nothing")
    assert code == 2 and "there are first steps, correctness, ceilings, kernels" in errors[0]


def test_a_dry_run_says_what_starts(bench):
    code, out, _ = bench("gpu_day", "--dry-run", "--only", "ceilings")
    assert code == 0 and out.splitlines()[0].split() == ["ceilings", "2.0", "min", "starts"]


def test_stages_stand_in_order_and_their_scripts_exist(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    stages = importlib.import_module("gpu_day").stages(tmp_path)
    names = [stage.name for stage in stages]
    assert names[:4] == ["first steps", "correctness", "ceilings", "kernels"]
    for stage in stages:
        assert all((ROOT / word).exists() for word in stage.command if word.endswith(".py"))
        # Only stages that train, or measure what was trained, may need what a bare machine lacks.
        assert (
            any(word.startswith("recipes/") for word in stage.command)
            or "deepspeed" not in stage.needs
            or stage.name in ("guidance", "speedrun", "their distance", "whole step")
        )
        earlier = stages[: stages.index(stage)]
        # The course needs published files; every other stage only needs what an earlier stage has made.
        assert stage.name == "course" or all(any(s.makes(path) for s in earlier) for path in stage.inputs)


def test_the_reference_stage_is_a_recipe_that_can_be_run(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    flags = importlib.import_module("gpu_day").reference(tmp_path)
    recipe = parse(Recipe, list(flags), default=small_text)
    recipe.check()
    assert sum(p.numel() for p in recipe.model.build().parameters()) > 100e6


def test_what_a_stage_trains_is_a_recipe_with_flags_that_it_takes(monkeypatch, tmp_path):
    """The dry run only asks a script for its help: an unknown flag would show up on the GPU, and cost its minutes."""
    monkeypatch.syspath_prepend(str(BENCH))
    seen = []
    for stage in importlib.import_module("gpu_day").stages(tmp_path):
        script = next((word for word in stage.command if word.endswith(".py")), "")
        flags = list(stage.command[stage.command.index(script) + 1 :]) if script else []
        if script.startswith("recipes/"):
            module = runpy.run_path(str(ROOT / script), run_name="stage")
            small = next(value for name, value in module.items() if name.startswith("small_"))
            base = module["recipe"] if "--data.shards" in flags and "--small" not in flags else small
            recipe = parse(Recipe, [flag for flag in flags if flag != "--small"], default=base)
            recipe.check()
            seen.append(stage.name)
        for flag in flags if script.startswith("bench/") else ():
            assert not flag.startswith("--") or f'"{flag}"' in (ROOT / script).read_text(), f"{script} has no {flag}"
    assert seen == ["first steps", "100 epochs", "demo", "reference", "reference whole"]


@pytest.fixture
def day(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("gpu_day")


HERE = {"device": "a GPU", "commit": "1"}


@pytest.mark.parametrize("before, said", [
    ({"machine": HERE | {"device": "another"}}, "a day of another device, another instead of a GPU: give another --out"),
    ({"machine": HERE | {"commit": "0"}}, "a day of another commit, 0 instead of 1: give another --out"),
    ({}, "a day of another device, None"),
    (None, "not the record of a day: give another --out"),
])  # fmt: skip
def test_another_days_folder_is_refused(before, said, bench, day, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(day, "machine", lambda: HERE)
    (tmp_path / "gpu_day.json").write_text(json.dumps(before) if before is not None else "{")
    code, out, errors = bench("gpu_day", "--only", "ceilings", "--out", tmp_path)
    assert code == 2 and not out and len(errors) == 1 and said in errors[0]


def python(code: str, *words) -> tuple[str, ...]:
    return (sys.executable, "-c", code, *map(str, words))


def test_a_day_that_was_cut_goes_on_where_it_was(day, monkeypatch, capsys, tmp_path):
    """A stage that ended well and left its result is not repeated; any other is."""
    monkeypatch.setattr(day, "machine", lambda: HERE)
    results, times = [tmp_path / name for name in ("first", "second", "third")], tmp_path / "times"
    write = f"open({str(times)!r}, 'a').write(sys.argv[1]); open(sys.argv[2], 'w')"
    chosen = [
        day.Stage("first", python("import sys; " + write, 1, results[0]), 1, result=results[0]),
        day.Stage("second", python("import sys; " + write, 2, tmp_path / "elsewhere"), 1, result=results[1]),
        day.Stage("third", python("import sys; " + write, 3, results[2]), 1, inputs=(results[1],), result=results[2]),
    ]
    day.day(chosen, tmp_path, 3)
    said = capsys.readouterr().out
    assert times.read_text() == "12" and "ok, no result" in said and f"skipped: {results[1]} not there" in said
    results[1].touch()
    day.day(chosen, tmp_path, 3)
    assert times.read_text() == "123"
    assert capsys.readouterr().out.count("done before") == 2
    stages = result(tmp_path / "gpu_day.json")["stages"]
    assert {row["stage"]: row["code"] for row in stages} == {"first": 0, "second": 0, "third": 0}


OBEDIENT = """
import pathlib, signal, sys, time
def end(*_):
    pathlib.Path(sys.argv[1]).touch()
    sys.exit(int(sys.argv[2]))
signal.signal(signal.SIGTERM, end)
time.sleep(60)
"""
DEAF = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).touch()
time.sleep(8)
pathlib.Path(sys.argv[2]).touch()
"""


def test_a_stage_is_told_to_end_before_it_is_killed(day, tmp_path):
    told, began, lived = (tmp_path / name for name in ("told", "began", "lived"))
    with (tmp_path / "log").open("w") as log:
        assert day.boxed(python(OBEDIENT, told, 143), 4.5, log) == "out of time" and told.exists()
        assert day.boxed(python(OBEDIENT, told, 0), 4.5, log) == 0
        assert day.boxed(python(DEAF, began, lived), 4.5, log) == "out of time" and began.exists()
    time.sleep(5)
    assert not lived.exists()


def test_a_stage_whose_inputs_no_one_makes_is_skipped(day, bench, tmp_path):
    code, out, _ = bench("gpu_day", "--dry-run", "--only", "guidance", "--out", tmp_path)
    weights = tmp_path / "demo" / "ema.safetensors"
    assert code == 0 and f"skipped: {weights} not there" in out and f"begins with {weights}: missing" in out
    made = {stage.name: stage for stage in day.stages(tmp_path)}
    assert day.origin(weights, [made["demo"]]) == "result of demo"
    weights.parent.mkdir()
    weights.touch()
    assert day.origin(weights, []) == "there"


def test_a_stage_is_skipped_ended_or_recorded(day, tmp_path):
    absent = day.Stage("absent", (sys.executable, "x.py"), 1, ("no_such_package",))
    assert day.run(absent, tmp_path, 1)["code"] == "skipped: no_such_package not installed"
    assert day.run(day.Stage("slow", python("import time; time.sleep(60)"), 1), tmp_path, 0.01)["code"] == "out of time"
    assert day.run(day.Stage("failing", python("raise SystemExit(3)"), 1), tmp_path, 1)["code"] == 3


BARE = """
import sys
for name in ("deepspeed", "nvidia", "nvidia.dali", "webdataset", "tyro", "transformers", "wandb", "matplotlib"):
    sys.modules[name] = None
sys.path.insert(0, "bench")
import ceilings, conv, gpu_day, sampling, switches, throughput, train_step
from pathlib import Path
assert {s.name for s in gpu_day.stages(Path("x")) if s.missing} == {"first steps", "course", "speedrun", "100 epochs", "their distance", "shards", "demo", "guidance", "reference", "whole step", "reference whole"}
for bench, flags in [(conv, ["--network", "tiny", "--shapes", "1", "--rounds", "1"]),
                     (sampling, ["--network", "tiny", "--batch", "1", "--steps", "1", "--rounds", "1"]), (ceilings, [])]:
    sys.argv = [bench.__name__ + ".py", *flags, "--json", sys.argv[-1]]
    bench.main()
"""


def test_a_bare_machine_runs_all_but_the_training_stages(tmp_path):
    command = [sys.executable, "-c", BARE, str(tmp_path / "out.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ------------------------------------------------------------------------------------------------- kernels and loading


def started(script: str, *flags) -> None:
    """Runs a bench in a separate process, free of other tests' threads and handlers."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(BENCH / script), *map(str, flags)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


def test_the_kernels_bench_says_what_the_compiler_makes_of_a_launch(tmp_path):
    started(
        "throughput.py",
        "--kernel",
        "guided_step",
        "--case",
        "single_128",
        "--dtype",
        "bf16",
        "--json",
        tmp_path / "k.json",
    )
    found = result(tmp_path / "k.json")
    text = json.dumps(found)
    assert '"spilled_bytes": 0' in text and "not yet measured" in text and "guided_step" in text


def test_a_part_of_the_kernels_bench_leaves_no_record_among_the_results():
    before = {path: path.stat().st_mtime_ns for path in (BENCH / "results").rglob("*")}
    started("throughput.py", "--kernel", "guided_step", "--case", "single_128")
    assert {path: path.stat().st_mtime_ns for path in (BENCH / "results").rglob("*")} == before


def test_photographs_that_are_not_there_are_refused_in_one_line(bench, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    code, out, errors = bench("loader", "--json", tmp_path / "l.json")
    assert code == 2 and not out and len(errors) == 1 and "pip install scikit-learn" in errors[0]


def test_a_picture_of_no_kind_is_refused(bench, tmp_path):
    code, out, errors = bench("schedules", "--out", tmp_path / "x.nope")
    assert code == 2 and not out and len(errors) == 1 and "x.nope" in errors[0] and not list(tmp_path.iterdir())


def test_words_that_no_table_knows_are_refused_and_help_writes_nothing(bench):
    before = {page: page.stat().st_mtime_ns for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    assert bench("tables", "what")[0] == 2 and bench("tables", "--help")[0] == 0
    assert {page: page.stat().st_mtime_ns for page in before} == before


@pytest.mark.long
def test_the_loaders_bench_reads_real_shards_by_every_reader(tmp_path):
    started("loader.py", "--rounds", 1, "--seconds", 0.1, "--threads", 1, "--json", tmp_path / "l.json")
    text = (tmp_path / "l.json").read_text()
    assert all(reader in text for reader in ("ours, Pillow", "webdataset + Pillow", "plain DALI"))


# ------------------------------------------------------------------------------------------------------- optimizers


def test_a_curve_comes_down_to_a_loss_between_its_measurements(bench, tmp_path):
    optimizers = importlib.import_module("optimizers")
    curves = {"AdamW": [(100, 0.8), (400, 0.4)], "Muon": [(100, 0.5), (400, 0.32)]}
    found = optimizers.found(curves, {"AdamW": 1.0, "Muon": 2.0})
    assert found["rows"] == [{"images": 100, "AdamW": 0.8, "Muon": 0.5}, {"images": 400, "AdamW": 0.4, "Muon": 0.32}]
    assert found["muon_reaches_adamws_last_loss_after"] == 200  # 0.5, 0.4, 0.32: half way in both logarithms
    assert found["share_of_its_images"] == 0.5
    assert optimizers.images_until(0.3, curves["Muon"]) is None
    code, _, errors = bench("optimizers", "--scratch", tmp_path, "--images", "100")
    assert code == 2 and "give a multiple of 192" in errors[0]


@pytest.mark.long
def test_both_contenders_train_and_are_measured(tmp_path):
    """On the first few hundred garments, with one step between two measurements."""
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not on this machine")
    images, labels = (FASHION / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    shards = tmp_path / "shards" / "train"
    PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=shards, limit=384).run()
    started("optimizers.py", "--scratch", tmp_path, "--images", 192, "--json", tmp_path / "out.json")
    found = result(tmp_path / "out.json")
    assert [row["images"] for row in found["rows"]] == [32, 64, 96, 128, 160, 192]
    assert found["rows"][-1]["AdamW"] != found["rows"][-1]["Muon"]
    assert set(found["core_seconds"]) == {"AdamW", "Muon"} and all(found["core_seconds"].values())


def test_contenders_train_the_speedruns_network(bench):
    """Their flags make recipes that training accepts and that differ only in the optimizer."""
    optimizers, speedrun = (importlib.import_module(name) for name in ("optimizers", "speedrun"))
    flags = [optimizers.flags_of(c, Path("data"), Path("scratch"), 9_600) for c in optimizers.CONTENDERS]
    made = [parse(Recipe, words, default=speedrun.recipe) for words in flags]
    for recipe in made:
        recipe.check()
    assert [type(recipe.optimizer).__name__ for recipe in made] == ["AdamW", "Muon"]
    assert made[0].optimizer.weight_decay == made[1].optimizer.weight_decay == 0
    assert replace(made[0], optimizer=made[1].optimizer, out=made[1].out) == made[1]
