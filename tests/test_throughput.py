"""The kernels' bench as on a GPU, timed by a CPU's clock: contenders, what is refused and why, the record, the bars."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

BENCH = Path(__file__).parent.parent / "bench"
SMALL = {
    "group_norm_silu": {"shape": (2, 64, 8, 8)},
    "attention": {"images": 2, "queries": 40, "heads": 2},
    "diffuse": {"shape": (2, 8, 8, 3)},
    "guided_step": {"shape": (2, 3, 8, 8)},
    "adamw_ema": {"parameters": 500},
    "squared_norm": {"parameters": 500},
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("throughput")


def measured(bench, kernel, case=None, drop=("compiled", "compiled, torch's noise"), **peers):
    """One small case of a kernel, without the contenders that a CPU compiles for minutes."""
    subject = bench.SUBJECTS[kernel]
    case = next(c for c in subject.cases if (c.name == case if case else c.timed))
    kept = {name: factory for name, factory in subject.peers.items() if name not in drop} | peers
    small = replace(case, **SMALL[kernel])
    return bench.measure_on_gpu(replace(subject, peers=kept), small, torch.float32, 2, device="cpu")


@pytest.mark.parametrize("kernel", SMALL)
def test_every_contender_is_timed_or_named(bench, kernel):
    found = measured(bench, kernel)
    peers = set(bench.SUBJECTS[kernel].peers) - {"compiled", "compiled, torch's noise"}
    assert set(found["milliseconds"]) | set(found["absent"]) == peers | {"ours"}
    assert set(found["absent"]) <= {"apex", "liger", "channels-last-groupnorm", "apex FusedAdamSWA"} | {
        "flash", "efficient", "cudnn", "xformers"}, found["absent"]  # fmt: skip
    assert set(found["gigabytes_per_second"]) == set(found["milliseconds"])
    assert bool(found["forward_milliseconds"]) == (kernel in ("group_norm_silu", "attention"))
    json.dumps(found)


def test_a_wrong_peer_is_named_and_a_wrong_kernel_is_not_timed(bench):
    wrong = measured(bench, "guided_step", wrong=lambda: lambda i: 2 * i["arguments"][1])
    assert "differs from the definition" in wrong["absent"]["wrong"] and "ours" in wrong["milliseconds"]
    subject = replace(bench.SUBJECTS["guided_step"], ours=lambda i: i["arguments"][1])
    case = replace(subject.cases[0], **SMALL["guided_step"])
    assert (
        "differs from its definition" in bench.measure_on_gpu(subject, case, torch.float32, 1, device="cpu")["failed"]
    )


def test_what_an_update_writes_is_compared_in_every_tensor(bench):
    subject = bench.SUBJECTS["adamw_ema"]

    def careless(i):
        out = subject.ours(i)
        i["emas"][0].add_(1.0)
        return out

    case = replace(subject.cases[0], parameters=500)
    assert bench.difference(subject, careless, case, torch.float32, "cpu") > 0.1
    assert bench.difference(subject, subject.ours, case, torch.float32, "cpu") < 1e-6


def test_a_case_that_fails_costs_itself_alone(bench, monkeypatch, tmp_path):
    sound = measured(bench, "guided_step")

    def failing(subject, case, *_):
        if case.name == "single_128":
            raise RuntimeError("CUDA out of memory\nand more")
        return sound

    path = tmp_path / "out.json"
    monkeypatch.setattr(bench, "measure_on_gpu", failing)
    monkeypatch.setattr(bench, "copy_bandwidth", lambda: 1000.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench, "machine", lambda: {"device": "a GPU", "date": "today"})
    monkeypatch.setattr(sys, "argv", ["throughput.py", "--kernel", "guided_step", "--json", str(path)])
    with pytest.raises(SystemExit) as stop:
        bench.main()
    rows = {row["case"]: row for row in json.loads(path.read_text())["results"]}
    assert stop.value.code == 1 and rows["single_128"]["failed"] == "RuntimeError: CUDA out of memory"
    assert rows["batch_128"]["milliseconds"]["ours"] and path.with_suffix(".png").stat().st_size > 5000


def result(kernel, case, floor=0, backward=None, **milliseconds):
    times = {name: {"median": value} for name, value in milliseconds.items()}
    forward = {name: {"median": times[name]["median"] - value} for name, value in (backward or {}).items()}
    return {"kernel": kernel, "case": case, "milliseconds": times, "forward_milliseconds": forward,
            "floor_bytes": floor, "gigabytes_per_second": {n: floor / v / 1e6 for n, v in milliseconds.items()}}  # fmt: skip


def test_bars_are_ratios_of_one_run(bench):
    results = [
        result("group_norm_silu", "level_128", 8e9, ours=10.0, compiled=30.0, apex=12.0),
        result("group_norm_silu", "level_8", 1e9, ours=2.0, compiled=6.0),
        result("group_norm_silu", "film_32", 1e9, ours=50.0, compiled=6.0),
        result("attention", "level_8_words", ours=3.0, flash=5.0, backward={"ours": 2.0, "flash": 3.0}),
        result("attention", "level_32_self", ours=2.0, flash=1.9, cudnn=4.0),
        result("adamw_ema", "network", 9e8, ours=1.0),
        {"kernel": "attention", "case": "wide_words", "failed": "out of memory"},
    ]
    rows = {row["bar"]: (round(row["found"], 3), bool(row["holds"])) for row in bench.bars(results, 1000.0)}
    assert rows == {
        # The network has 8 norms of the first shape and 17 of the second.
        "group_norm_silu, times the ideal bytes": (1.407, False),
        "group_norm_silu, times compiled (2 shapes)": (3.0, True),
        "group_norm_silu, times apex (1 shapes)": (1.2, False),
        "attention, backward over 77 keys, times the best peer": (1.5, False),
        "attention elsewhere, times the best peer": (0.95, False),
        "adamw_ema, share of copy bandwidth": (0.9, True),
    }


# ------------------------------------------------------------------------------------- libraries that are not here
# Stand-ins with the published signatures: how each library is called is tested without it.


class GroupNorm(torch.nn.GroupNorm):
    def __init__(self, num_groups, num_channels, eps=1e-5, affine=True, device=None, dtype=None, act=None,
                 activation="identity"):  # fmt: skip
        super().__init__(num_groups, num_channels, eps, affine)
        self.silu = "silu" in (act, activation)

    def _check_legality(self, x_NCHW):
        return x_NCHW.is_contiguous(memory_format=torch.channels_last) and self.num_channels != 384

    def forward(self, x_NCHW):
        y_NCHW = super().forward(x_NCHW)
        return F.silu(y_NCHW) if self.silu else y_NCHW


class LigerGroupNormFunction:
    @staticmethod
    def apply(X, affine_scaling_weight, affine_shifting_bias, num_channels, num_groups, eps):
        assert X.shape[1] == num_channels
        return F.group_norm(X.contiguous(), num_groups, affine_scaling_weight, affine_shifting_bias, eps)


def stand_in(monkeypatch, name, **content):
    module = ModuleType(name)
    vars(module).update(content)
    monkeypatch.setitem(sys.modules, name, module)


def test_other_norms_are_asked_in_their_own_words(bench, monkeypatch):
    stand_in(monkeypatch, "apex.contrib.group_norm", GroupNorm=GroupNorm)
    stand_in(monkeypatch, "gnnhwc", GN_NHWC=GroupNorm)
    stand_in(monkeypatch, "liger_kernel.ops.group_norm", LigerGroupNormFunction=LigerGroupNormFunction)
    found = measured(bench, "group_norm_silu", "level_128")
    assert not found["absent"] and {"apex", "liger", "channels-last-groupnorm"} < set(found["milliseconds"])
    modulated = measured(bench, "group_norm_silu", "film_32")
    assert modulated["absent"]["apex"] == "NotImplementedError: it has no modulation"
    monkeypatch.setitem(SMALL, "group_norm_silu", {"shape": (1, 384, 2, 2)})
    assert "do not list 384 channels" in measured(bench, "group_norm_silu", "level_8")["absent"]["apex"]


class FusedAdamSWA:
    """Buffers by name, as the kernel receives them; each entry is one chunk of 128 elements."""

    def __init__(self, params, compute_params, swa_params, swa_decay_rate, lr, weight_decay, adam_math_mode):
        self.swa_decay_rate, self.adam_math_mode, self.state = swa_decay_rate, adam_math_mode, {}
        self.tensors = params[0], compute_params[0], swa_params[0]

    def _build_pointer_buffers(self):
        master, weights, ema = self.tensors
        names = ("param", "compute_param", "swa_param", "exp_avg", "exp_avg_sq")
        held = (master, weights, ema, self.state[master]["exp_avg"], self.state[master]["exp_avg_sq"])
        buffers = {f"{name}_ptr_per_chunk": tensor for name, tensor in zip(names, held)}
        buffers |= {"chunks_per_param": torch.tensor([-(-master.numel() // 128)]), "total_chunks": 4}
        buffers |= {"chunk_local_idx": None, "chunk_numel": None, "default_grad_clip_scale": 1.0}
        self.pointer_buffer_groups = {(weights.dtype, master.dtype): buffers}


class Kernel:
    def __getitem__(self, grid):
        return self.run

    def run(self, *, state_param_ptr_per_chunk, compute_param_ptr_per_chunk, swa_param_ptr_per_chunk,
            grad_ptr_per_chunk, moment_ptr_per_chunk, velocity_ptr_per_chunk, chunk_local_idx_ptr, chunk_numel_ptr,
            grad_clip_scale_ptr, lr, beta1, beta2, eps, weight_decay, beta1_correction, beta2_correction,
            swa_decay_rate, swa_n_averaged, adam_math_mode, MODEL_COMPUTE_DTYPE, MODEL_STATE_DTYPE, CHUNK_SIZE,
            BLOCK_SIZE, num_warps):  # fmt: skip
        assert grad_ptr_per_chunk.shape == (4,) and swa_n_averaged == 1 and adam_math_mode == 1
        master, average, square = state_param_ptr_per_chunk, moment_ptr_per_chunk, velocity_ptr_per_chunk
        average.lerp_(self.gradient.float(), 1 - beta1)
        square.mul_(beta2).addcmul_(self.gradient.float(), self.gradient.float(), value=1 - beta2)
        step = (average / beta1_correction) / ((square / beta2_correction).sqrt() + eps) + weight_decay * master
        master.sub_(lr * step)
        swa_param_ptr_per_chunk.lerp_(master, 1 - swa_decay_rate)
        compute_param_ptr_per_chunk.copy_(master)


def test_the_update_of_apex_is_asked_in_its_own_words(bench, monkeypatch):
    kernel, mode = Kernel(), SimpleNamespace(ApexAdamW=SimpleNamespace(value=1))
    content = dict(FusedAdamSWA=FusedAdamSWA, _multi_tensor_adam_swa=kernel, AdamMathType=mode)
    types = {torch.bfloat16: 1, torch.float32: 2}
    content |= {"_TORCH2DTYPE": types, "CHUNK_SIZE": torch.tensor(128)}
    stand_in(monkeypatch, "apex.contrib.openfold_triton.fused_adam_swa", **content)
    subject = bench.SUBJECTS["adamw_ema"]
    call = subject.peers["apex FusedAdamSWA"]()

    def with_its_gradient(i):  # the kernel follows the pointer, the stand-in is given the tensor
        kernel.gradient = i["state"][1]
        return call(i)

    case = replace(next(c for c in subject.cases if c.timed), parameters=500)
    assert bench.difference(subject, with_its_gradient, case, torch.bfloat16, "cpu") < 1e-2
    with pytest.raises(NotImplementedError, match="one track"):
        bench.difference(subject, with_its_gradient, replace(case, tracks=2), torch.bfloat16, "cpu")


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("group_norm_silu", "level_8"),
        ("group_norm_silu", "level_32"),
        ("group_norm_silu in turns", "level_32"),
        ("attention", "level_8_words"),
        ("guided_step", "batch_128_rescaled"),
        ("adamw_ema", "two_tracks"),
    ],
)
def test_numbers_handed_over_in_fp64_widen_nothing(bench, kernel, case):
    """torch.compile passes them: every value combined with one would be computed in fp64, at a fraction of the speed."""
    harness, subjects = importlib.import_module("harness"), importlib.import_module("subjects")
    subject = subjects.SUBJECTS[kernel]
    launches = subjects.launches_of(subject, next(c for c in subject.cases if c.name == case), torch.bfloat16)
    taking = [launch for launch in launches if any(isinstance(v, float) for v in launch.arguments.values())]
    assert taking
    for launch in taking:
        assert harness.fp64_arithmetic(launch, 90) == [], launch.name
