"""Muon against torch's own and against its polynomial in fp64; a group cut into shards against the whole; two real ranks."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.engine import checkpoint, memory, train
from duotone.engine.artifact import build
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.distributed import meeting, zero
from duotone.engine.distributed.sharded import Sharded
from duotone.engine.model.unet import UNetConfig
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.matrices import Matrices
from duotone.engine.optimizers.muon import Muon, matrices_of, orthogonalised, step_of
from duotone.engine.recipe import Recipe
from duotone.engine.speed import Choice

ROWS, BIN = 8, Path(sys.executable).parent
CONFIG = Muon(lr=1e-2, weight_decay=0.1, clip=0.0, warmup=0)
SMALL = UNetConfig(
    channels=(8, 16), attention=("none", "self"), middle="self", heads=(1, 1), blocks=(1, 1), depth=(1, 1), groups=8
)


@pytest.fixture(scope="module")
def group_of_one():
    zero.join("cpu")
    yield
    if meeting.SET_HERE:  # the run at the end has left already; leaving twice would end the group for later tests
        zero.leave()


def network_of(config: UNetConfig = SMALL) -> nn.Module:
    torch.manual_seed(0)
    recipe = Recipe(name="t", conditioning=(Label(),), model=config, optimizer=CONFIG)
    return build(recipe, Facts(classes=("cat", "dog")))


def exactly(x_KMN: torch.Tensor) -> torch.Tensor:
    """U p(...p(S / |S|)) V' from an SVD in fp64, with the polynomial applied five times."""
    u, s, v = torch.linalg.svd(x_KMN.double(), full_matrices=False)
    s = s / s.norm(dim=-1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u * s[..., None, :] @ v


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20), (1, 16, 16), (1, 1, 9)])
def test_singular_values_pass_through_the_polynomial_and_vectors_stay(shape):
    torch.manual_seed(0)
    x_KMN = torch.randn(shape)
    y_KMN = orthogonalised(x_KMN, 5)
    torch.testing.assert_close(y_KMN.double(), exactly(x_KMN), rtol=1e-4, atol=1e-4)
    assert torch.linalg.svdvals(y_KMN).min() > 0.6 and torch.linalg.svdvals(y_KMN).max() < 1.3
    assert orthogonalised(torch.zeros(shape), 5).count_nonzero() == 0


@pytest.mark.gpu
def test_on_a_gpu_the_polynomial_runs_in_bf16():
    torch.manual_seed(0)
    x_KMN = torch.randn(3, 64, 576)
    on_gpu = orthogonalised(x_KMN.cuda(), 5)
    assert on_gpu.dtype == torch.float32
    assert (on_gpu.cpu() - orthogonalised(x_KMN, 5)).norm() < 0.05 * on_gpu.norm()


def test_it_moves_what_acts_on_pixels_and_tokens_and_adamw_the_rest():
    network = network_of()
    names = {id(p): name for name, p in network.named_parameters()}
    moved = {names[id(p)] for p in matrices_of(network)}
    kept = {name for name, p in network.named_parameters() if p.ndim > 1} - moved
    assert {name for name in kept if "time_emb" not in name} == {
        "unet.conv_in.weight",
        "unet.conv_out.weight",
        "conditioners.label.embedding.weight",
    }
    assert all(".conv" in name or ".to_" in name for name in moved) and not any("time_emb" in name for name in moved)
    groups = CONFIG.build(network).param_groups
    assert [len(group["params"]) for group in groups[:2]] == [len(moved), len(kept)]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.1, 0.0]


def layers() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(7, 33, bias=False), nn.SiLU(), nn.Linear(33, 33, bias=False), nn.Linear(33, 5, bias=False)
    )


def sharded(
    network: nn.Module, precision: str = "fp32", stage: int = 1, ranks: int = 1, clip: float = CONFIG.clip
) -> Sharded:
    batch = {"batch": ROWS * ranks, "micro": ROWS, "accumulation": 1}
    settings = zero.settings(zero.Zero(stage=stage), **batch, precision=precision, clip=clip)
    return Sharded(network, CONFIG.build(network), settings)


def loss_of(network, step: int, spoilt: bool = False) -> torch.Tensor:
    g = torch.Generator().manual_seed(step)
    x, wanted = torch.randn(ROWS, 7, generator=g), torch.randn(ROWS, 5, generator=g)
    x[0, 0] = float("inf") if spoilt else x[0, 0]
    dtype = next(network.parameters()).dtype
    return (network(x.to(dtype)).float() - wanted).square().sum(1).mean()


@pytest.mark.parametrize(("stage", "clip"), [(1, 0.0), (2, 0.0), (1, 2.0)])
def test_equals_torchs_muon(group_of_one, stage, clip, monkeypatch):
    """20 steps with decay and a falling rate. torch's polynomial runs in bf16, too coarse for gradients of low rank.

    A single step does not depend on its gradient's norm, but the momentum does: some of the gradients are clipped.
    """
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", lambda x_MN, *_: exactly(x_MN).float())
    mine, theirs, norms = sharded(layers(), stage=stage, clip=clip), layers(), []
    begin = [p.detach().clone() for p in theirs.parameters()]
    muon = torch.optim.Muon(theirs.parameters(), weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(20):
        rate = 1e-2 / (1 + 0.1 * step)
        mine.optimizer.set(lr=rate, ema_decay=0.9)
        mine.backward(loss_of(mine.engine.module, step))
        mine.step()
        muon.param_groups[0]["lr"] = rate
        muon.zero_grad()
        loss_of(theirs, step).backward()
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), clip or torch.inf).item())
        muon.step()
    assert not clip or min(norms) < 0.8 * clip and max(norms) > 1.25 * clip, norms
    for (name, p), q, start in zip(mine.gather("weight").items(), theirs.parameters(), begin):
        assert (p - q).norm() < 1e-3 * (q - start).norm(), name
    assert not mine.gather("exp_avg_sq")  # a second moment would be a quarter of the state


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_gradients_that_are_not_finite_change_nothing(group_of_one, precision):
    made = sharded(layers(), precision=precision)

    def take(step: int, spoilt: bool = False) -> dict:
        made.optimizer.set(lr=1e-2, ema_decay=0.9)
        made.backward(loss_of(made.engine.module, step, spoilt))
        made.step()
        kinds = {kind: made.gather(kind) for kind in ("weight", "exp_avg", "ema")}
        return {f"{kind}/{name}": value for kind, named in kinds.items() for name, value in named.items()}

    before, after, later = take(0), take(1, spoilt=True), take(2)
    assert made.skipped == 1
    assert all(value.equal(before[name]) for name, value in after.items())
    assert all(value.isfinite().all() and not value.equal(before[name]) for name, value in later.items())


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_shards_put_together_what_is_cut(ranks, monkeypatch):
    """However many shards the matrices are cut into, each rank's part equals that of the whole, bit for bit."""
    shapes = [torch.Size(s) for s in ((4, 3, 3, 3), (8, 5), (5, 8), (16, 4, 1, 1), (4, 3, 3, 3), (30, 40))]
    offsets = [sum(s.numel() for s in shapes[:i]) for i in range(len(shapes))]
    length = sum(s.numel() for s in shapes)
    shard = -(-length // ranks) + 1  # padded at its end, as DeepSpeed does
    flat_P = torch.zeros(ranks * shard)
    flat_P[:length] = torch.randn(length)
    step = partial(step_of, iterations=5)
    whole = Matrices(shapes, offsets, len(flat_P), 0).each(flat_P, step)
    parts, rows = flat_P.split(shard), [Matrices(shapes, offsets, shard, rank) for rank in range(ranks)]
    given: list[torch.Tensor] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: given.append(t.clone()))
    for mine, part_P in zip(rows, parts):
        mine.put_together(part_P)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda t: t.copy_(sum(given)))
    together = torch.cat([mine.each(part_P, step) for mine, part_P in zip(rows, parts)])
    assert together.equal(whole)
    assert (rows[0].cut > 0) == (ranks > 1) and together[length:].count_nonzero() == 0


SCRIPT = """
import json, sys
from duotone.engine.distributed import zero
sys.path.insert(0, {folder!r})
import test_muon as t
zero.join("cpu")
made = t.sharded(t.layers(), ranks=2)
for step in range(5):
    made.optimizer.set(lr=1e-2, ema_decay=0.9)
    made.backward(t.loss_of(made.engine.module, step))
    made.step()
    named = {{kind: made.gather(kind, to_rank_0=False) for kind in ("weight", "exp_avg", "ema")}}
cut = made.update.matrices(0).cut
if zero.dist.get_rank() == 0:
    json.dump({{"cut": cut, "state": {{k: {{n: v.tolist() for n, v in d.items()}} for k, d in named.items()}}}}, open({out!r}, "w"))
made.close()
del made
zero.leave()
"""


@pytest.mark.launcher
def test_two_ranks_step_as_one_does(group_of_one, tmp_path):
    """Launcher, two ranks, a matrix cut between them: the same batches give the same weights, momentum and EMA."""
    (tmp_path / "two.py").write_text(SCRIPT.format(folder=str(Path(__file__).parent), out=str(tmp_path / "two.json")))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": f"{BIN}:{os.environ['PATH']}"}
    for name in meeting.SET_HERE:
        environment.pop(name, None)
    port = str(29000 + os.getpid() % 400)
    command = [str(BIN / "deepspeed"), "--num_accelerators", "2", "--master_port", port, str(tmp_path / "two.py")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found, one = json.loads((tmp_path / "two.json").read_text()), sharded(layers())
    assert found["cut"] > 0
    for step in range(5):
        one.optimizer.set(lr=1e-2, ema_decay=0.9)
        one.backward(loss_of(one.engine.module, step))
        one.step()
    for kind in ("weight", "exp_avg", "ema"):
        for name, value in one.gather(kind).items():
            torch.testing.assert_close(torch.tensor(found["state"][kind][name]), value, rtol=1e-4, atol=1e-6)


def test_stage_3_and_values_out_of_range_are_refused():
    recipe = Recipe(name="t", conditioning=(Label(),), model=SMALL, optimizer=CONFIG, batch_size=10)
    recipe.check()
    with pytest.raises(Refused, match="zero.stage = 3, but Muon needs whole matrices"):
        replace(recipe, zero=zero.Zero(stage=3)).check()
    for field, value in (("momentum", 1.0), ("iterations", 0), ("lr", 0.0)):
        with pytest.raises(Refused, match=f"optimizer.{field}"):
            replace(recipe, optimizer=replace(CONFIG, **{field: value})).check()


def test_the_estimate_leaves_out_the_second_moment():
    network, choice = network_of(), Choice("cpu", "fp32", False)
    state = [
        memory.estimate(network, Recipe(name="t", optimizer=optimizer), 1, choice, 1).state
        for optimizer in (AdamW(), CONFIG)
    ]
    assert state[0] - state[1] == 4 * sum(p.numel() for p in matrices_of(network))


def test_a_run_goes_on_bit_for_bit(tmp_path):
    """The checkpoint holds a momentum for every weight, but second moments only for those that AdamW updates."""
    captioned_shapes.write(tmp_path / "shapes", count=16, size=16, seed=0)
    tiny = runpy.run_path(str(Path(__file__).with_name("tiny_recipe.py")))["recipe"]
    muon = Muon(lr=2e-3, warmup=16)
    data = replace(tiny.data, shards=tmp_path / "shapes")
    recipe = replace(tiny, data=data, optimizer=muon, images=32, out=tmp_path / "run")
    train(recipe)
    first, last = sorted((tmp_path / "run" / "checkpoints").iterdir())
    expected = checkpoint.read(last)[1]
    assert expected["exp_avg_sq"].keys() < expected["exp_avg"].keys() == expected["weight"].keys()
    shutil.rmtree(last)
    train(recipe)
    found = checkpoint.read(last)[1]
    for kind, named in expected.items():
        assert all(found[kind][name].equal(value) for name, value in named.items())
    assert not any(value.equal(checkpoint.read(first)[1]["weight"][name]) for name, value in found["weight"].items())
