"""What a start needs: the memory estimate, a run's log after a resume, a port for its ranks."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import main, memory, run_folder
from duotone.engine.distributed import zero
from duotone.engine.entry import base_of
from duotone.engine.log import Log, Logger, duration
from duotone.engine.model.network import Network
from duotone.engine.model.unet import UNetConfig
from duotone.engine.optimizers.adamw import AdamW, AdamWEma
from duotone.engine.optimizers.base import parameter_groups
from duotone.engine.optimizers.ema import Ema
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.set_up import with_accumulation
from duotone.engine.speed import Choice

ROOT = Path(__file__).parent.parent.parent
CPU = Choice("cpu", "fp32", False)


def test_rows_past_the_resumed_image_are_cut_and_a_torn_last_row_too(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"images": n}) + "\n" for n in (8, 16, 24)) + '{"images": 3')
    run_folder.keep_rows_up_to(path, 16)
    assert [json.loads(line)["images"] for line in path.read_text().splitlines()] == [8, 16]


def test_a_tracker_that_fails_is_dropped_and_the_metrics_go_on(tmp_path, capsys):
    logger = Logger(Log(every=1), tmp_path, 24, 0, speaks=True, recipe={})

    def broken(row):
        raise ConnectionError("no network")

    logger.listeners.append(broken)
    for step in (1, 2):
        logger.step(step, 8 * step, 8, lambda: {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3})
    logger.step(
        3, 16, 8, lambda: {"loss": 1.0, "grad_norm": math.nan, "learning_rate": 1e-3}
    )  # a step that was skipped
    logger.close()
    told = [json.loads(line, parse_constant=int) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["grad_norm"] for row in told] == [1.0, 1.0, None]
    assert capsys.readouterr().out.count("dropped") == 1
    assert duration(3725) == "1:02:05"


def test_a_run_that_had_ended_keeps_its_measurements(tmp_path):
    """When such a run is started again, its last measurement is repeated in place, or not at all."""
    rows = [{"images": 4, "loss": 2.0}, {"images": 8, "loss": 1.0}]
    (tmp_path / "validation.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    logger = Logger(Log(), tmp_path, 8, 8, speaks=True, recipe={})
    assert len((tmp_path / "validation.jsonl").read_text().splitlines()) == 2
    logger.validated({"images": 8, "loss": 0.5})
    logger.close()
    told = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    assert told == [rows[0], {"images": 8, "loss": 0.5}]


def test_a_run_that_diverged_writes_json(tmp_path):
    """JSON has no NaN: the first one would make the file unreadable for any other reader."""
    logger = Logger(Log(trace=True), tmp_path, 8, 0, speaks=True, recipe={})
    logger.validated({"images": 8, "loss": math.nan, "levels": [{"sigma": 1.0, "loss": math.inf, "low": None}]})
    logger.trace({"images": 8, "loss": math.nan, "keys": ["a"]})
    logger.close()
    told = [
        json.loads((tmp_path / name).read_text(), parse_constant=int) for name in ("validation.jsonl", "trace.jsonl")
    ]
    assert told[0] == {"images": 8, "loss": None, "levels": [{"sigma": 1.0, "loss": None, "low": None}]}
    assert told[1] == {"images": 8, "loss": None, "keys": ["a"]}


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("in the way")
    logger = Logger(Log(every=1, tensorboard=True), tmp_path, 8, 0, speaks=True, recipe={})
    logger.step(1, 8, 8, lambda: {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 1e-3})
    logger.close()
    assert "tensorboard does not start, metrics.jsonl continues" in capsys.readouterr().out
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_learning_rate_and_ema_are_functions_of_images():
    schedule = AdamW(lr=1.0, warmup=100, schedule="cosine")
    assert schedule.lr_at(0, 1100) == 0 and schedule.lr_at(50, 1100) == 0.5 and schedule.lr_at(100, 1100) == 1
    assert schedule.lr_at(600, 1100) == pytest.approx(0.5) and schedule.lr_at(1100, 1100) == pytest.approx(0)
    assert AdamW(lr=1.0, warmup=0, schedule="constant").lr_at(7, 8) == 1
    ema = Ema(half_life=1000, rampup=0.05)
    assert ema.decay(10**9, 10) ** 100 == pytest.approx(0.5)
    assert ema.decay(200, 10) == pytest.approx(0.5)  # 5 % of 200 images is one batch of 10
    power = Ema(power=0.75, max_decay=0.9999)
    assert power.decay(100, 10) == pytest.approx(1 - 11**-0.75) and power.decay(10**9, 10) == 0.9999


def test_the_optimizer_is_torchs_adamw_with_an_ema_beside_it():
    torch.manual_seed(0)
    ours, theirs = torch.nn.Linear(5, 3), torch.nn.Linear(5, 3)
    theirs.load_state_dict(ours.state_dict())
    config = AdamW(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    mine = config.build(ours)
    reference = torch.optim.AdamW(parameter_groups(theirs.parameters(), 0.1), lr=1e-2, betas=(0.8, 0.95))
    average = [p.detach().double().clone() for p in theirs.parameters()]
    for _ in range(30):
        x = torch.randn(4, 5)
        for network, optimizer in ((ours, mine), (theirs, reference)):
            optimizer.zero_grad()
            network(x).square().sum().backward()
        mine.set(lr=1e-2, ema_decay=0.9)
        mine.step()
        reference.step()
        average = [0.9 * a + 0.1 * p.detach().double() for a, p in zip(average, theirs.parameters())]
    for p, q, a in zip(ours.parameters(), theirs.parameters(), average):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(mine.state[p]["ema"].double(), a, rtol=1e-5, atol=1e-7)
    assert isinstance(mine, AdamWEma)


def test_a_decay_too_small_for_one_factor_decays():
    """1 - 1e-8 is 1 in fp32, a factor that decays nothing; added to the step, it decays the mean of many weights."""
    weights = [torch.nn.Parameter(torch.ones(64, 64)) for _ in range(2)]
    optimizers = [AdamW(weight_decay=d).build(torch.nn.ParameterList([w])) for d, w in zip((0.0, 1e-4), weights)]
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        gradient = torch.randn(64, 64, generator=g)
        for weight, optimizer in zip(weights, optimizers):
            weight.grad = gradient.clone()
            optimizer.set(lr=1e-4, ema_decay=0.9)
            optimizer.step()
    assert (weights[0] - weights[1]).double().mean().item() == pytest.approx(200 * 1e-8, rel=0.1)


def test_memory_is_counted_without_allocating():
    config = UNetConfig(
        channels=(16, 32),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=8,
        groups=8,
    )
    unet = config.build()
    small, large = (memory.saved_per_image(unet, side, CPU) for side in (16, 32))
    assert 3.2 < large / small < 6  # pixels quadruple; attention grows faster, what depends on weights alone not at all
    unet.checkpointing = True
    assert memory.saved_per_image(unet, 32, CPU) < large / 2
    assert all(p.device.type == "cpu" for p in unet.parameters())


def test_previews_ask_for_what_the_model_takes():
    from types import SimpleNamespace

    from duotone.engine.drawing import Examples, asked_for, repeated

    conditioner = SimpleNamespace(keyword="prompts", spatial=False)
    model = SimpleNamespace(network=SimpleNamespace(conditioners={"text": conditioner}))
    assert asked_for(Previews(rows=2), model, Examples(captions=("a", "b", "c"))) == {"prompts": ["a", "b"]}
    assert asked_for(Previews(prompts=("x",)), model, Examples(captions=("a",))) == {"prompts": ["x"]}
    assert repeated({"prompts": ["a", "b"]}, 2) == {"prompts": ["a", "a", "b", "b"]}


def test_a_folder_has_one_process_at_a_time(tmp_path):
    """A claim lasts as long as its process: a claim file left behind means nothing."""
    folder = tmp_path / "run"
    folder.mkdir()
    with run_folder.claimed(folder):
        for other in (lambda: run_folder.claimed(folder).__enter__(), lambda: run_folder.move_aside(folder)):
            with pytest.raises(Refused, match=f"run is in use by process {os.getpid()} on .*: wait"):
                other()
    with run_folder.claimed(folder):
        pass
    code = "import sys, os; from pathlib import Path; from duotone.engine.run_folder import claimed\n"
    code += "with claimed(Path(sys.argv[1])): os._exit(0)"
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)
    assert run_folder.stored_recipe(folder) is None, "a claim alone is no content"
    assert run_folder.move_aside(folder).name == "run-before-1"


@pytest.mark.parametrize("begun", [False, True], ids=["moved", "begun anew"])
def test_a_folder_moved_aside_while_it_is_claimed_is_refused(begun, tmp_path, monkeypatch):
    """Otherwise two processes would train in the new folder, or this one would move it away from under the other."""
    folder, lock = tmp_path / "run", run_folder.fcntl.flock
    folder.mkdir()

    def late(claim, how):
        folder.rename(tmp_path / "run-before-1")
        if begun:
            folder.mkdir()
            (folder / run_folder.CLAIM).write_text("process 1")
        lock(claim, how)

    monkeypatch.setattr(run_folder.fcntl, "flock", late)
    with pytest.raises(Refused, match="run: another process moved it aside"):
        run_folder.move_aside(folder)
    assert folder.exists() == begun


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="cannot be made .*: give another --out"):
        run_folder.made(tmp_path / "file" / "run")
    with pytest.raises(Refused, match="file cannot be written to .*: give another --out"):
        run_folder.move_aside(tmp_path / "file")
    assert (tmp_path / "file").exists()


def test_a_small_run_on_ones_own_data_has_its_own_name():
    """Under the name of the embedded data's run, small runs of all recipes would share one folder."""
    full, small = Recipe(name="full"), Recipe(name="captioned_shapes")
    assert base_of(full, small, ["--small"]).name == "captioned_shapes"
    assert base_of(full, small, ["--small", "--data.shards", "x"]).name == "full_small"


def test_data_that_a_recipe_names_is_ones_own(capsys):
    """Just like data that the command line names: otherwise a small network would be trained on other pictures."""
    full, small = Recipe(name="full", data=Shards(shards="x", size=32)), Recipe(name="shapes", data=Shards(size=16))
    assert base_of(full, small, []) == full and base_of(full, small, ["--help"]) == full
    taken = base_of(full, small, ["--small"])
    assert (taken.name, taken.data) == ("full_small", Shards(shards="x", size=16))
    assert not capsys.readouterr().out


def test_the_folder_one_stands_in_can_be_moved_aside(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path / "run")
    assert run_folder.move_aside(Path(".")) == tmp_path / "run-before-1"


def test_an_old_run_is_moved_aside_not_deleted(tmp_path):
    for n in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "x").write_text(str(n))
        assert run_folder.move_aside(tmp_path / "run").name == f"run-before-{n}"
    assert sorted(os.listdir(tmp_path)) == ["run-before-1", "run-before-2"]


def test_the_estimate_of_activations_is_what_autograd_keeps():
    """The estimate is counted on tensors without storage, and compared with what a real forward pass saves."""
    config = UNetConfig(
        channels=(16, 32),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=16,
        groups=8,
    )
    unet, kept = config.build(), {}
    weights = {p.untyped_storage()._cdata for p in unet.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        unet(torch.randn(1, 3, 32, 32), torch.zeros(1), None, torch.randn(1, 77, 16))
    real = sum(storage.nbytes() for at, storage in kept.items() if at not in weights)
    assert memory.saved_per_image(unet, 32, CPU) == pytest.approx(real, rel=0.02)
    assert memory.saved_per_image(unet, 32, Choice("cuda", "bf16", True)) < real / 2


def test_help_shows_the_recipe_and_tells_of_the_small_network(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x", "--help"])
    with pytest.raises(SystemExit, match="0"):
        main(Recipe(name="full", batch_size=96), Recipe(name="small", batch_size=16))
    said = capsys.readouterr().out
    assert (
        "with --small, a small network is trained instead" in said and "96" in said and "training a small" not in said
    )


def test_a_port_that_another_run_holds_is_one_line(tmp_path):
    """Two launchers on one machine take the same port unless told otherwise."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = str(held.getsockname()[1])
        environment = os.environ | {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        environment |= {
            "MASTER_PORT": port,
            "DS_ACCELERATOR": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, str(ROOT / "recipes" / "image_folder.py"), "--out", str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    refusals = [line for line in done.stderr.splitlines() if "refused" in line]
    assert done.returncode == 2 and len(refusals) == 1 and "--master_port" in refusals[0], done.stderr[-2000:]
    assert f"127.0.0.1:{port}" in refusals[0] and "Traceback" not in done.stderr and not (tmp_path / "run").exists()


CONFIG = UNetConfig(
    channels=(16, 32),
    attention=("none", "self"),
    middle="self",
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    groups=8,
)
ON_CUDA = Choice("cuda", "bf16", True)


def room(network: Network, recipe: Recipe, micro: int) -> int:
    """Bytes of a GPU that holds `micro` images at once, and not one more."""
    needed = memory.estimate(network, recipe, micro, ON_CUDA, 1)
    return int((needed.state + needed.activations) / memory.USABLE) + 1


def test_the_fewest_micro_batches_that_fit_are_taken():
    """With room for a quarter of the batch, for all of it, for one image less, for one image, and for not even one."""
    recipe = Recipe(name="r", model=CONFIG, data=Shards(size=32), batch_size=16, images=16)
    network = Network(CONFIG.build(), [])
    rooms = [room(network, recipe, micro) for micro in (4, 16, 15, 1)]
    assert [memory.fewest_micro_batches(network, recipe, ON_CUDA, 1, one) for one in rooms] == [4, 1, 2, 16]
    with pytest.raises(Refused, match="one image at a time needs about .*--speed.gradient-checkpointing"):
        memory.fewest_micro_batches(network, recipe, ON_CUDA, 1, rooms[-1] // 2)


@pytest.mark.parametrize(
    "asked,stored,taken",
    [(3, {"accumulation": 2}, 3), (None, {"accumulation": 2}, 2), (None, None, 1), (None, {"accumulation": 48}, 1)],
)
def test_an_interrupted_run_goes_on_with_its_own_micro_batches(asked, stored, taken):
    ranks = zero.Ranks(0, 1, torch.device("cpu"))
    recipe = Recipe(name="r", accumulation=asked)
    assert with_accumulation(recipe, stored, None, CPU, ranks).accumulation == taken


@pytest.mark.parametrize("before,taken", [(1, 4), (4, 4), (8, 8)])
def test_an_interrupted_run_goes_on_where_less_fits(before, taken, monkeypatch):
    """On eight GPUs a rank takes its share in one micro-batch; on a single one, the whole batch would not fit."""
    recipe = Recipe(name="r", model=CONFIG, data=Shards(size=32), batch_size=16, images=16)
    network, gpu = Network(CONFIG.build(), []), SimpleNamespace()
    gpu.total_memory = room(network, recipe, 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(zero, "gathered", lambda mine: mine)
    monkeypatch.setattr("duotone.engine.set_up.tried", lambda *_: True)
    ranks = zero.Ranks(0, 1, torch.device("cuda", 0))
    assert with_accumulation(recipe, {"accumulation": before}, network, ON_CUDA, ranks).accumulation == taken
