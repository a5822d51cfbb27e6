"""A step recorded whole equals the eager step. A stand-in for a CUDA graph allows only what a replay can do."""

import gc
import importlib
import json
import os
import runpy
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

from duotone.engine import checkpoint, speed
from duotone.engine.cuda_graph import Recorded
from duotone.engine.distributed import meeting, zero
from duotone.engine.distributed.sharded import Sharded
from duotone.engine.log import Log
from duotone.engine.optimizers import adamw
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.base import OptimizerConfig
from duotone.engine.optimizers.muon import Muon
from duotone.engine.speed import Choice, Speed
from duotone.engine.whole_step import WholeStep

TINY = Path(__file__).parent / "tiny_recipe.py"
train = importlib.import_module("duotone.engine.train")  # the package's `train` is the function
ROWS, STEPS = 6, 12
CONFIG = AdamW(lr=1e-2, weight_decay=0.1, clip=0.5, warmup=0)
MUON = Muon(lr=1e-2, weight_decay=0.1, clip=0.5, warmup=0)


class Operators(TorchDispatchMode):
    """Notes every operator with all its arguments except tensors' values: what a CUDA graph fixes when it is recorded.

    Garbage collection is off meanwhile, because an earlier test's engine calls operators when it is freed.
    """

    now: "Operators | None" = None

    def __init__(self):
        super().__init__()
        self.seen = []

    def __enter__(self):
        gc.disable()
        Operators.now = self
        return super().__enter__()

    def __exit__(self, *raised):
        Operators.now = None
        gc.enable()
        return super().__exit__(*raised)

    def note(self, name, arguments, options):
        leaves = tree_leaves((arguments, options))
        self.seen.append((name, [tuple(x.shape) if isinstance(x, torch.Tensor) else str(x) for x in leaves]))

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        name = str(function)
        assert "_local_scalar_dense" not in name and "lift_fresh" not in name, f"{name} goes to the CPU and back"
        self.note(name, arguments, options or {})
        return function(*arguments, **(options or {}))


class RunAgain:
    """Stands in for a CUDA graph: its own inputs, outputs in one place, and the same operators at every replay."""

    made: list["RunAgain"] = []

    def __init__(self, function, inputs):
        self.function, self.replays = function, 0
        self.inputs = [tensor.clone() for tensor in inputs]
        function(*self.inputs)  # warms up
        with Operators() as recorded:
            self.outputs = function(*self.inputs)
        self.recorded = recorded.seen
        RunAgain.made.append(self)

    def __call__(self, *inputs):
        for own, given in zip(self.inputs, inputs, strict=True):
            own.copy_(given)
        with Operators() as now:
            found = self.function(*self.inputs)
        assert now.seen == self.recorded, "a replay would go on with what the recording saw"
        for own, value in zip(self.outputs, found, strict=True):
            own.copy_(value)
        self.replays += 1
        return self.outputs


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    if os.environ.get("DS_ACCELERATOR") == "cuda":  # tests on a GPU run in separate processes
        yield
        return
    zero.join("cpu")
    yield
    # If the runs below have left already, leaving twice would end the group for later tests.
    if meeting.SET_HERE:
        zero.leave()


@pytest.fixture(autouse=True)
def update_in_one_operator(monkeypatch):
    """Counts the update as one operator, as on a GPU: on a CPU, its definition reads the mark of a skipped step."""
    update_ = adamw.adamw_ema_

    def noted(*tensors, **options):
        if Operators.now is None:
            return update_(*tensors, **options)
        Operators.now.note("adamw_ema_", tensors, options)
        with _disable_current_modes():
            return update_(*tensors, **options)

    monkeypatch.setattr(adamw, "adamw_ema_", noted)


def sharded(stage: int, precision: str, optimizer: OptimizerConfig = CONFIG) -> Sharded:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(7, 33), nn.SiLU(), nn.Dropout(0.2), nn.LayerNorm(33), nn.Linear(33, 5))
    network[1].unused = nn.Linear(3, 3)
    config = zero.settings(
        zero.Zero(stage=stage), batch=ROWS, micro=ROWS, accumulation=1, precision=precision, clip=CONFIG.clip
    )
    return Sharded(network, optimizer.build(network), config)


def loss_of(network, inputs: dict) -> torch.Tensor:
    return 3 * (network(inputs["x"]).float() - inputs["pair"]["wanted"]).square().sum(1).mean()


def inputs_at(step: int, precision: str, spoilt=(), rows: int = ROWS) -> dict:
    g = torch.Generator().manual_seed(step)
    x, wanted = torch.randn(rows, 7, generator=g), torch.randn(rows, 5, generator=g)
    if step in spoilt:
        x[0, 0] = float("inf")
    return {"x": x.to(torch.bfloat16 if precision == "bf16" else torch.float32), "pair": {"wanted": wanted}}


def run(made: Sharded, step, precision: str, **given) -> list[tuple[float, float, int]]:
    """Loss, gradient norm and skipped steps after each of STEPS steps, each at its own rate."""
    rows = []
    torch.manual_seed(5)
    for number in range(STEPS):
        made.optimizer.set(lr=1e-2 / (1 + number), ema_decay=0.5 + number / 50)
        rows.append((step(inputs_at(number, precision, **given)), made.grad_norm(), made.skipped))
    return [(loss.item(), norm, skipped) for loss, norm, skipped in rows]


def counted(made: Sharded) -> dict:
    engine, partitioned = made.engine, made.engine.optimizer
    of_engine = {name: getattr(engine, name) for name in ("micro_steps", "global_steps", "global_samples")}
    of_engine["boundary"] = engine.is_gradient_accumulation_boundary()
    return made.counters() | of_engine | {"overflow": partitioned.overflow}


def same_state(mine: Sharded, theirs: Sharded) -> None:
    assert counted(mine) == counted(theirs)
    for (name, a), b in zip(mine.update.state().items(), theirs.update.state().values(), strict=True):
        assert a.equal(b), name
    for a, b in zip(mine.engine.module.parameters(), theirs.engine.module.parameters()):
        assert a.equal(b) and a.grad is None


@pytest.mark.parametrize(
    "stage,precision,optimizer",
    [(1, "fp32", CONFIG), (1, "bf16", CONFIG), (2, "fp32", CONFIG), (2, "bf16", CONFIG), (1, "fp32", MUON)],
    ids=lambda value: type(value).__name__ if isinstance(value, OptimizerConfig) else str(value),
)
def test_replayed_steps_are_the_eager_ones_bit_for_bit(stage, precision, optimizer):
    """Twelve steps with dropout, an unused layer, rates that change, clipping, and two steps that must be skipped."""
    mine, theirs, said = sharded(stage, precision, optimizer), sharded(stage, precision, optimizer), []
    whole = WholeStep(mine, loss_of, said.append, recorder=RunAgain)
    eager = WholeStep(theirs, loss_of, said.append)
    found = run(mine, whole, precision, spoilt=(4, 7))
    expected = run(theirs, eager.eager, precision, spoilt=(4, 7))
    assert str(found) == str(expected) and found[-1][2] == 2  # as text: NaN is NaN
    assert not said and RunAgain.made[-1].replays == STEPS, "one to prove itself, then all but the first"
    same_state(mine, theirs)


def gathered_in(loss: torch.Tensor) -> set[int]:
    """The ids of the leaves in which the graph of a loss accumulates gradients."""
    nodes, leaves = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions if following is not None]
    return leaves


def test_a_recording_gathers_gradients_in_leaves_of_its_own():
    """Nodes that DeepSpeed keeps belong to the stream on which they were created, whose work a GPU would not record."""
    made, met = sharded(1, "fp32"), []

    def watched(network, inputs: dict) -> torch.Tensor:
        loss = loss_of(network, inputs)
        met.append(gathered_in(loss))
        return loss

    whole = WholeStep(made, watched, pytest.fail, recorder=RunAgain)
    run(made, whole, "fp32")
    eagerly, *recorded = met
    own = {id(p) for p in made.engine.module.parameters()}
    assert eagerly <= own and len(recorded) >= STEPS
    assert all(leaves and leaves.isdisjoint(own) for leaves in recorded)


def test_a_step_can_be_taken_eagerly_between_replayed_ones():
    """For inputs of another shape, or in a run that continues without its recording."""
    mine, theirs = sharded(1, "fp32"), sharded(1, "fp32")
    whole = WholeStep(mine, loss_of, pytest.fail, recorder=RunAgain)
    eager = WholeStep(theirs, loss_of, pytest.fail).eager
    for made, step in ((mine, whole), (theirs, eager)):
        torch.manual_seed(5)
        for number in range(STEPS):
            made.optimizer.set(lr=1e-2, ema_decay=0.9)
            step(inputs_at(number, "fp32", rows=4 if number % 3 == 2 else ROWS))
    assert RunAgain.made[-1].replays == 8
    same_state(mine, theirs)


class Refuses(RunAgain):
    def __init__(self, function, inputs):
        super().__init__(function, inputs)  # takes steps, which must leave no trace
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


class DoesNothing(RunAgain):
    def __call__(self, *inputs):
        return self.outputs


class StepsTwice(RunAgain):
    def __call__(self, *inputs):
        super().__call__(*inputs)
        return super().__call__(*inputs)


class ForgetsItsInputs(RunAgain):
    def __call__(self, *inputs):
        return super().__call__(*(torch.zeros_like(tensor) for tensor in inputs))


@pytest.mark.parametrize("recorder", [Refuses, DoesNothing, StepsTwice, ForgetsItsInputs])
def test_a_recording_that_fails_leaves_the_eager_run_and_a_line(recorder):
    mine, theirs, said = sharded(1, "fp32"), sharded(1, "fp32"), []
    found = run(mine, WholeStep(mine, loss_of, said.append, recorder=recorder), "fp32")
    expected = run(theirs, WholeStep(theirs, loss_of, said.append).eager, "fp32")
    assert found == expected
    same_state(mine, theirs)
    (line,) = said
    assert line.startswith("speed.whole_step: steps are taken one launch at a time, since the recording failed (")
    assert "\n" not in line


def test_what_reads_the_hosts_numbers_is_caught_by_the_stand_in(monkeypatch):
    """A test of the stand-in: a learning rate that is a Python number is fixed in the recording, as in a CUDA graph."""
    made = sharded(1, "fp32")
    apply = made.update.apply

    def with_a_number(gradients):
        made.update.lr.fill_(made.optimizer.param_groups[0]["lr"])
        return apply(gradients)

    monkeypatch.setattr(made.update, "apply", with_a_number)
    with pytest.raises(AssertionError, match="a replay would go on with what the recording saw"):
        run(made, WholeStep(made, loss_of, pytest.fail, recorder=RunAgain), "fp32")


# ------------------------------------------------------------------------------------------------------------- a run


def outcome(folder) -> tuple[dict, dict, list]:
    """The last checkpoint, and what the run logged for every step."""
    path, _ = checkpoint.newest(folder / "checkpoints")
    manifest, tensors = checkpoint.read(path)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "images", "loss", "grad_norm", "learning_rate", "skipped")
    return manifest["counters"], tensors, [{name: row[name] for name in kept} for row in rows if "loss" in row]


def test_a_run_of_whole_steps_is_the_same_run_and_goes_on_from_its_checkpoints(tmp_path, monkeypatch):
    """Twelve steps of text and labels; one run is cut in the middle and resumed without recordings."""
    recipe = replace(runpy.run_path(str(TINY))["recipe"], accumulation=1)
    eager = train.train(replace(recipe, out=tmp_path / "eager"))
    monkeypatch.setattr(train, "WholeStep", partial(WholeStep, recorder=RunAgain))
    with monkeypatch.context() as patch:
        patch.setattr(speed, "why_not_whole_step", lambda *_: None)
        whole = train.train(replace(recipe, out=tmp_path / "whole"))
        assert RunAgain.made[-1].replays == STEPS - 1, "the first step, at a rate of 0, proves nothing"
        real = train.train_step

        def until_the_middle(run, batches):
            real(run, batches)
            if run.images == 64:
                raise KeyboardInterrupt

        patch.setattr(train, "train_step", until_the_middle)
        with pytest.raises(KeyboardInterrupt):
            train.train(replace(recipe, out=tmp_path / "cut"))
    cut = train.train(replace(recipe, out=tmp_path / "cut"))
    expected = outcome(eager)
    for folder in (whole, cut):
        counters, tensors, rows = outcome(folder)
        assert counters == expected[0] and len(expected[2]) == STEPS
        assert rows[-4:] == expected[2][-4:]
        for kind, named in expected[1].items():
            assert all(tensors[kind][name].equal(value) for name, value in named.items()), kind
    assert outcome(whole)[2] == expected[2]


@pytest.mark.parametrize(
    "change,says",
    [
        ({}, None),
        ({"speed": Speed()}, "unless asked for"),
        ({"choice": Choice("cpu", "fp32", False)}, "without a CUDA device"),
        ({"choice": Choice("cuda", "fp16", True)}, "in fp16"),
        ({"stage": 3}, "at ZeRO-3"),
        ({"ranks": 2}, "with several ranks"),
        ({"accumulation": 2}, "with accumulation"),
        ({"speed": Speed(whole_step=True, gradient_checkpointing=True)}, "with gradient checkpointing"),
    ],
    ids=str,
)
def test_where_it_does_not_hold_is_said(change, says):
    given = {"speed": Speed(whole_step=True), "choice": Choice("cuda", "bf16", True), "stage": 1, "ranks": 1}
    held = speed.why_not_whole_step(**given | {"accumulation": 1} | change)
    assert (held is None) == (says is None) and (held or "").startswith(says or "")


# ---------------------------------------------------------------------------------------------------------- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("stage,precision", [(1, "bf16"), (2, "bf16"), (1, "fp32")])
def test_recorded_steps_are_the_eager_ones(stage, precision):
    """In a separate process, because DeepSpeed settles on one kind of device per process."""
    call = f"import runpy; runpy.run_path({__file__!r})['compare_on_a_gpu']({stage}, {precision!r})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def compare_on_a_gpu(stage: int, precision: str) -> None:
    zero.join("cuda")
    mine, theirs = sharded(stage, precision), sharded(stage, precision)
    for made in (mine, theirs):
        made.engine.module[2].p = 0.0
    whole, eager = WholeStep(mine, loss_of, pytest.fail), WholeStep(theirs, loss_of, pytest.fail).eager

    def on_device(step):
        return lambda inputs: step(tree_map(torch.Tensor.cuda, inputs))

    found = run(mine, on_device(whole), precision, spoilt=(4, 7))
    expected = run(theirs, on_device(eager), precision, spoilt=(4, 7))
    assert whole.replay is not None
    for mine_row, their_row in zip(found, expected, strict=True):
        assert mine_row == pytest.approx(their_row, rel=2e-2, nan_ok=True)
    assert counted(mine) == counted(theirs)


@pytest.mark.gpu
@pytest.mark.parametrize("whole", [True, False], ids=["replayed", "eager"])
def test_a_step_never_waits_for_the_device(tmp_path, whole):
    """So that the next step is queued when the device finishes one."""
    call = f"import runpy; runpy.run_path({__file__!r})['never_waiting_on_a_gpu']({str(tmp_path)!r}, {whole})"
    done = subprocess.run([sys.executable, "-c", call], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def never_waiting_on_a_gpu(folder: str, whole: bool) -> None:
    recipe = replace(runpy.run_path(str(TINY))["recipe"], accumulation=1, out=Path(folder) / "run")
    recipe = replace(recipe, log=Log(every=1000), speed=Speed(precision="bf16", compile=False, whole_step=whole))
    real, watched, synchronize = train.train_step, [], torch.cuda.synchronize

    def waiting(*_):
        raise AssertionError("torch.cuda.synchronize, of which the debug mode knows nothing")

    def train_step(run, batches):
        amid = 2 <= run.step < STEPS - 2  # the first steps are recorded, and the last one's numbers are read
        torch.cuda.set_sync_debug_mode("error" if amid else "default")
        torch.cuda.synchronize = waiting if amid else synchronize
        real(run, batches)
        torch.cuda.synchronize = synchronize
        torch.cuda.set_sync_debug_mode("default")
        watched.append(amid and (not whole or run.whole_step.replay is not None))

    train.train_step = train_step
    train.train(recipe)
    assert sum(watched) == STEPS - 4, "steps were watched, and replayed"


@pytest.mark.gpu
def test_a_recording_that_fails_leaves_the_device_as_it_was():
    """torch.cuda.graph itself would leave work on its own stream, and a generator that can no longer draw."""
    stream = torch.cuda.current_stream()
    seed = torch.cuda.initial_seed()
    x = torch.ones(4, device="cuda")
    with pytest.raises(RuntimeError):
        # Reading a number is allowed while it warms up, but not while it is recorded.
        Recorded(lambda x: x * torch.rand_like(x).sum().item(), (x,))
    assert torch.cuda.current_stream() == stream and torch.cuda.initial_seed() == seed
    assert torch.rand(4, device="cuda").isfinite().all()
    assert Recorded(lambda x: x + torch.rand_like(x), (x,))(x).shape == (4,)
