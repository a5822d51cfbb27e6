"""Our update for ZeRO 1 and 2 against DeepSpeed's own on the same gradients, and the passes that it avoids."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from duotone.data.refusal import Refused
from duotone.engine import checkpoint
from duotone.engine.distributed import zero
from duotone.engine.distributed.sharded import Sharded
from duotone.engine.optimizers.adamw import AdamW, AdamWEma
from duotone.engine.optimizers.base import parameter_groups

ROWS = 8
CONFIG = AdamW(lr=1e-2, weight_decay=0.1, clip=0.5, warmup=0)


@pytest.fixture(scope="module", autouse=True)
def group_of_one():
    zero.join("cpu")
    yield
    zero.leave()


@pytest.fixture(autouse=True)
def fp16_on_every_cpu(monkeypatch):
    """DeepSpeed requires a CPU that is fast in fp16, but every CPU can compute in it."""
    from deepspeed.accelerator import get_accelerator

    monkeypatch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 33), nn.SiLU(), nn.LayerNorm(33), nn.Linear(33, 5))


def sharded(
    network: nn.Module, *, stage: int, precision: str, accumulation: int = 1, ours: bool = True, build=CONFIG.build
) -> Sharded:
    config = zero.settings(
        zero.Zero(stage=stage),
        batch=ROWS * accumulation,
        micro=ROWS,
        accumulation=accumulation,
        precision=precision,
        clip=CONFIG.clip,
    )
    made = Sharded(network, build(network), config)
    if not ours:
        del made.engine.optimizer.step
        made.update = None
    return made


def run(made: Sharded, steps: int, accumulation: int = 1, spoilt: tuple[int, ...] = ()) -> list[float]:
    """Gradient norms of `steps` updates; at the spoilt ones an input is infinite."""
    norms, dtype = [], next(made.engine.module.parameters()).dtype
    for step in range(steps):
        made.optimizer.set(lr=1e-2 / (1 + step), ema_decay=0.9)
        for micro in range(accumulation):
            g = torch.Generator().manual_seed(100 * step + micro)
            x, wanted = torch.randn(ROWS, 7, generator=g), torch.randn(ROWS, 5, generator=g)
            if step in spoilt:
                x[0, 0] = float("inf")
            loss = 3 * (made(x.to(dtype)).float() - wanted).square().sum(1).mean()
            made.backward(loss)
            made.step()
        norms.append(made.grad_norm())
    return norms


def state(made: Sharded) -> dict[str, torch.Tensor]:
    named = {kind: made.gather(kind) for kind in ("weight", "exp_avg", "exp_avg_sq", "ema")}
    return {f"{kind}/{name}": value for kind, values in named.items() for name, value in values.items()}


@pytest.mark.parametrize(
    "stage,precision,accumulation", [(1, "fp32", 1), (1, "bf16", 1), (2, "bf16", 3), (2, "fp32", 2)]
)
def test_equals_deepspeeds_own(stage, precision, accumulation):
    """Clipped at every step, with weight decay and a falling rate."""
    options = {"stage": stage, "precision": precision, "accumulation": accumulation}
    mine, theirs = (sharded(small_network(), **options, ours=ours) for ours in (True, False))
    norms = [run(made, 5, accumulation) for made in (mine, theirs)]
    assert min(norms[0]) > CONFIG.clip
    # DeepSpeed rounds the norm of the summed bf16 gradients to fp32, and multiplies the gradients by 1 / scale.
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    for name, value in state(theirs).items():
        torch.testing.assert_close(state(mine)[name], value, rtol=2e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")
    for (name, a), b in zip(mine.engine.module.named_parameters(), theirs.engine.module.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-2 if precision == "bf16" else 2e-5, atol=1e-6, msg=name)


class Signs(AdamWEma):
    """A custom optimizer, which moves along the signs of its momentum and counts its steps."""

    STATE = ("exp_avg", "taken", "ema")

    def move(self, shard, grad, group, *, lr, ema_decays, grad_scale=1.0, weights_out=None, **_):
        state = self.state_of(shard)
        state["taken"].add_(1)
        state["exp_avg"].lerp_(grad * grad_scale, 0.1)
        shard.data.sub_(lr * state["exp_avg"].sign())
        state["ema"].lerp_(shard.data, 1 - ema_decays[0])
        if weights_out is not None:
            weights_out.copy_(shard.data)


def by_signs(network: nn.Module) -> Signs:
    return Signs(parameter_groups(network.parameters(), 0.0), CONFIG)


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_of_ones_own_is_stepped_at_every_stage(stage, tmp_path):
    """And its state is gathered, stored and read back."""
    made, by_adam = (sharded(small_network(), stage=stage, precision="fp32", build=b) for b in (by_signs, CONFIG.build))
    before = made.gather("weight")
    run(made, 1)
    run(by_adam, 1)
    for name, value in made.gather("weight").items():
        moved = (before[name] - value).abs()
        torch.testing.assert_close(moved, torch.where(moved > 0, 1e-2, 0.0), rtol=1e-3, atol=1e-7)
        assert not value.equal(by_adam.gather("weight")[name])
    run(made, 2)
    tensors = {kind: made.gather(kind) for kind in ("weight", *made.optimizer.STATE)}
    assert all((value == 3).all() for value in tensors["taken"].values()) and len(tensors["taken"]) == 6
    stored = checkpoint.publish(tmp_path, 24, tensors, {})
    assert checkpoint.verify(stored) is None
    assert checkpoint.read(stored)[1].keys() == {"weight", "exp_avg", "taken", "ema"}
    (stored / "taken.safetensors").unlink()
    assert checkpoint.verify(stored) is not None


def test_a_step_that_nothing_would_call_is_refused():
    class Own(AdamWEma):
        def step(self, closure=None):
            raise AssertionError

    for build in (lambda n: torch.optim.SGD(n.parameters()), lambda n: Own([{"params": n.parameters()}], CONFIG)):
        with pytest.raises(
            Refused, match="the step of (SGD|Own) would never be called: make it an AdamWEma that overrides `move`"
        ):
            sharded(small_network(), stage=1, precision="fp32", build=build)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_that_are_not_finite_change_nothing_and_are_counted(precision):
    made = sharded(small_network(), stage=1, precision=precision)
    run(made, 2)
    before, steps = copy.deepcopy(state(made)), made.counters()["adam_steps"]
    run(made, 2, spoilt=(0, 1))
    assert made.skipped == 2 and made.counters()["adam_steps"] == steps
    assert all(value.equal(before[name]) for name, value in state(made).items())
    run(made, 1)
    assert made.counters()["adam_steps"] == steps + 1
    assert not state(made)["weight/0.weight"].equal(before["weight/0.weight"])


@pytest.mark.parametrize("stage,accumulation", [(1, 1), (2, 2)])
def test_in_fp16_the_loss_scale_is_deepspeeds_and_goes_on_after_a_resume(stage, accumulation):
    """The first scale is too large for this loss: steps are skipped and the scale halves, as at spoilt steps."""
    options = {"stage": stage, "precision": "fp16", "accumulation": accumulation}
    mine, theirs = (sharded(small_network(), **options, ours=ours) for ours in (True, False))
    for made in (mine, theirs):
        run(made, 8, accumulation, spoilt=(3, 4))
    assert mine.counters()["scaler"] == theirs.counters()["scaler"] and mine.skipped == theirs.engine.skipped_steps > 2
    for name, value in state(theirs).items():
        torch.testing.assert_close(state(mine)[name], value, rtol=2e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    again = sharded(small_network(), **options)
    run(again, 1, accumulation)  # the first step creates the optimizer's state
    for kind in ("weight", "exp_avg", "exp_avg_sq", "ema"):
        again.scatter(kind, mine.gather(kind))
    again.restore_counters(mine.counters())
    assert run(again, 3, accumulation) == run(mine, 3, accumulation)
    assert again.counters() == mine.counters()


class Written(TorchDispatchMode):
    """Notes the operators that write tensors as large as a shard."""

    def __init__(self, at_least: int):
        super().__init__()
        self.at_least, self.operators = at_least, []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        out = function(*arguments, **(options or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.at_least and not function.is_view:
            self.operators.append(str(function.overloadpacket))
        return out


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_fp32_weights_begin_as_they_were_given(stage, precision):
    """DeepSpeed rounds the network first: master weights and EMA would begin from rounded weights."""
    network = small_network()
    given = {name: p.detach().clone() for name, p in network.named_parameters()}
    made = sharded(network, stage=stage, precision=precision)
    for kind in ("weight", "ema"):
        found = made.gather(kind)
        assert all(torch.equal(found[name], given[name]) for name in given), kind
    made.optimizer.set(lr=0.0, ema_decay=0.5)
    loss = made(torch.ones(ROWS, 7, dtype=next(network.parameters()).dtype)).float().square().mean()
    made.backward(loss)
    made.step()
    assert all(torch.equal(value, given[name]) for name, value in made.gather("ema").items())


def test_stage_3_takes_back_what_it_put_in_place_of_torchs_linear(monkeypatch):
    """Otherwise a later run in the same process would round differently from one in a new process."""
    monkeypatch.setattr(torch.nn.functional, "linear", before := torch._C._nn.linear)  # other tests never close theirs
    made = sharded(small_network(), stage=3, precision="bf16")
    assert torch.nn.functional.linear is not before
    made.close()
    assert torch.nn.functional.linear is before


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("precision,accumulation", [("fp32", 1), ("bf16", 1), ("bf16", 2)])
def test_no_step_waits_for_the_device(stage, precision, accumulation, monkeypatch):
    """DeepSpeed's timers would, twice per micro-batch from the third step on."""
    from deepspeed.accelerator import get_accelerator

    waits = []
    made = sharded(small_network(), stage=stage, precision=precision, accumulation=accumulation)
    monkeypatch.setattr(get_accelerator(), "synchronize", lambda *_: waits.append(1))
    run(made, 5, accumulation)
    assert not waits


def whole_passes(ours: bool) -> list[str]:
    """Operators that write a whole shard, besides the kernel itself."""
    made = sharded(nn.Linear(64, 64, bias=False), stage=1, precision="bf16", ours=ours)
    made.optimizer.update = lambda *_: None
    for _ in range(2):  # the first step creates the state and the buffer
        made.backward(made(torch.randn(ROWS, 64, dtype=torch.bfloat16)).float().square().mean())
        with Written(64 * 64) as seen:
            made.step()
    return seen.operators


def test_deepspeeds_cast_clip_and_copy_passes_are_gone(monkeypatch):
    monkeypatch.setattr("duotone.engine.optimizers.adamw.adamw_ema_", lambda *_, **__: None)
    monkeypatch.setattr(
        "duotone.engine.distributed.update.squared_norm", lambda grad_P: torch.ones((), dtype=torch.float64)
    )
    mine, theirs = whole_passes(True), whole_passes(False)
    assert mine == ["aten.cat"], mine
    assert len(theirs) >= 4, theirs  # two casts, the clip, the copy
