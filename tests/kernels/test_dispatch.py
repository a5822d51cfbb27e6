"""Where a call goes, and what is reported about it; each claim is tested in a separate process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duotone.kernels.dispatch import constant_in_graphs

HERE = Path(__file__).parent
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from duotone.kernels import adamw_ema, attention, diffuse, dispatch, group_norm_silu, guided_step, self_test
assert not dispatch.HAS_TRITON and self_test.self_test("cpu") == []
weight_C = torch.ones(8)
image_NCHW = torch.randn(1, 8, 4, 4, requires_grad=True)
group_norm_silu.group_norm_silu(image_NCHW, weight_C, weight_C, 2).sum().backward()
attention.attention(*[torch.randn(1, 4, 2, 8)] * 3)
assert not dispatch.launches and not dispatch.fallbacks()
"""
# Before the kernels are imported: only there do operators show torch.compile what they launch.
AS_IN_A_BUILD_WITH_CUDA = "import torch; torch.backends.cuda.is_built = lambda: True"
# torch.compile's caches look these up to notice an edited kernel.
KERNELS_ARE_FOUND = """
from torch._library.triton import get_triton_kernels_for_op
from duotone.kernels import attention, group_norm_silu, guided_step
found = {name: len(get_triton_kernels_for_op(f"duotone::{name}")) for name in (
    "group_norm_silu", "group_norm_silu_backward", "attention", "attention_backward", "guided_step")}
assert list(found.values()) == [4, 4, 1, 1, 2], found
"""
# Both passes are traced on tensors without storage, for a chip that is absent, and stopped before anything runs.
ONE_GRAPH = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from duotone.kernels import adamw_ema, attention, group_norm_silu, guided_step, squared_norm

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

class Stop(BaseException):
    pass

triton.runtime.driver.set_active(Driver())
for module in (adamw_ema, attention, group_norm_silu, guided_step, squared_norm):
    module.runs_kernel = lambda *_: True

def kernels_seen(function, *inputs, dynamic=False):
    seen = []
    def count(graph, _):
        seen.append(sum("triton_kernel_wrapper" in str(node.target) for node in graph.graph.nodes))
        if len(seen) == 2:
            raise Stop
        return graph
    try:
        backend = aot_autograd(fw_compiler=count, bw_compiler=count)
        compiled = torch.compile(function, fullgraph=True, backend=backend, dynamic=dynamic)
        result = compiled(*inputs).sum()
        if torch.is_grad_enabled():
            result.backward()
    except Stop:
        pass
    return seen

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

def norm(x_NCHW, row_C, row_NC):
    return group_norm_silu.group_norm_silu(x_NCHW.relu(), row_C, row_C, 16, add_NC=row_NC, scale_NC=row_NC).sin()

for side, launches in ((8, [1, 1]), (40, [2, 2])):
    x_NCHW = empty(2, 64, side, side).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert kernels_seen(norm, x_NCHW, empty(64), empty(2, 64)) == launches
def guide(prediction, x_NCHW, row_N):
    return guided_step.guided_step(prediction.sin(), x_NCHW.detach(), row_N, row_N, row_N, rescale=0.7).cos()

def update(flat_P, numbers):
    adamw_ema.adamw_ema_(
        flat_P[0], flat_P[1], flat_P[2], flat_P[3], [flat_P[4]], lr=numbers[0], step=numbers[1], betas=(0.9, 0.99),
        eps=1e-8, weight_decay=0.1, grad_scale=1 / squared_norm.squared_norm(flat_P[1]), ema_decays=[numbers[2]],
    )
    return flat_P[0].sin()

attend = lambda q, k: attention.attention(q.sin(), k, k).cos()
with torch.no_grad():
    image_NCHW = empty(2, 3, 8, 8).to(memory_format=torch.channels_last)
    pair_NCHW = empty(4, 3, 8, 8).to(memory_format=torch.channels_last)
    assert kernels_seen(guide, pair_NCHW, image_NCHW, empty(2)) == [2]
    assert kernels_seen(update, empty(5, 100, dtype=torch.float32), empty(3, dtype=torch.float32)) == [2]
assert kernels_seen(attend, empty(2, 100, 4, 64), empty(2, 77, 4, 64)) == [1, 1]
torch.compiler.reset()
assert kernels_seen(norm, x_NCHW, empty(64), empty(2, 64), dynamic=True) == [2, 2]
assert kernels_seen(attend, empty(3, 90, 4, 32), empty(3, 70, 4, 32), dynamic=True) == [1, 1]
"""
# All of opcheck except the values, for which a kernel would have to run: results stay unwritten, NaN on both sides.
OPERATORS_ARE_SOUND = """
import functools, torch, triton
from triton.backends.compiler import GPUTarget
from duotone.kernels import adamw_ema, attention, diffuse, group_norm_silu, guided_step, squared_norm

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

triton.runtime.driver.set_active(Driver())
triton.runtime.jit.JITFunction.run = lambda *_, **__: None
torch.use_deterministic_algorithms(True)
torch.testing.assert_close = functools.partial(torch.testing.assert_close, equal_nan=True)

def last(*shape):
    return torch.randn(shape).contiguous(memory_format=torch.channels_last)

def check(name, *arguments):
    found = torch.library.opcheck(getattr(torch.ops.duotone, name).default, arguments)
    assert set(found.values()) == {"SUCCESS"}, (name, found)

def tokens(images, queries, keys, heads, width):
    return [torch.randn(images, n, heads, width, requires_grad=True) for n in (queries, keys, keys)]

for channels, side in ((32, 8), (64, 40)):
    inputs = (last(2, channels, side, side), *torch.randn(2, channels).unbind(), *torch.randn(3, 2, channels).unbind())
    x_NCHW, *rest = (t.requires_grad_() for t in inputs)
    check("group_norm_silu", x_NCHW, None, *rest, 8, 1e-5, True, False)
check("attention", *tokens(3, 40, 77, 4, 64), torch.arange(77) < torch.tensor([[0], [5], [77]]), 0.125)
check("attention", *tokens(1, 300, 20, 1, 16), None, 0.125)
for rescale in (0.0, 0.7):
    check("guided_step", last(4, 3, 8, 8), last(2, 3, 8, 8), *torch.ones(3, 2).unbind(), rescale)
flat = [torch.rand(5000) for _ in range(5)]
check("adamw_ema_", *flat[:4], flat[4:], flat[0].bfloat16(), torch.rand(5), 0.9, 0.999, 1e-8, 0.1)
check("squared_norm", flat[0])
which = torch.zeros(2, dtype=torch.bool), torch.ones(2, 4), 3, torch.zeros(2, dtype=torch.int64)
check("diffuse", torch.zeros(2, 8, 8, 3, dtype=torch.uint8), *which, 1, torch.bfloat16)
"""
# As on a GPU with more keys than our kernel takes, but without the chip: measured while tracing, in any shape.
MANY_KEYS_ARE_ONE_GRAPH = """
import torch
from duotone.kernels import attention
from duotone.kernels import attention_backends as backends

seen = []
def measure(device_index, *shape):
    seen.append(shape)
    return {"backend": "xformers", "milliseconds": {"xformers": 1.0, "cudnn": 2.0, "flash": 3.0}, "refused": {}}

torch.cuda.is_current_stream_capturing = lambda: False
backends._measure, backends.on_a_cpu = measure, backends.by_measurement
# A CPU has no cuDNN to be restricted to: what the graph restricts itself to is kept.
backends.BACKENDS["cudnn"] = backends._restricted(backends.SDPBackend.MATH)
for dynamic in (False, True):
    torch._dynamo.reset()
    attend = torch.compile(attention.attention, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for images in (2, 3):
        q, k = (torch.randn(images, n, 2, 16, requires_grad=True) for n in (64, 150))
        out = attend(q, k, k)
        torch.testing.assert_close(out, attention.attention_reference(q, k, k), rtol=1e-4, atol=1e-4)
        out.sum().backward()
assert [shape[0] for shape in seen] == [2, 3], seen
assert all(type(part) is not torch.SymInt for shape in seen for part in shape)
"""
ON_A_CPU = """
import sys, torch
from duotone.kernels import dispatch, group_norm_silu
weight_C = torch.ones(8)
image_NCHW = torch.randn(1, 8, 4, 4)
group_norm_silu.group_norm_silu(image_NCHW, weight_C, weight_C, 2)
assert "xformers" not in sys.modules
assert not dispatch.launches and not dispatch.fallbacks()
run = torch.compile(lambda x: group_norm_silu.group_norm_silu(x, weight_C, weight_C, 2), backend="eager", fullgraph=True)
run(image_NCHW)
group_norm_silu.runs_kernel = lambda *_: True
torch.compiler.reset()
for images in (1, 2, 3):
    run(torch.randn(images, 8, 4, 4, dtype=torch.float64))
assert dispatch.fallbacks() == [{"kernel": "group_norm_silu", "reason": "torch.float64 images", "shape": []}]
"""


def run(*command, interpret="0"):
    environment = os.environ | {"TRITON_INTERPRET": interpret, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=environment, cwd=HERE.parents[1]
    )


@pytest.mark.parametrize(
    "program",
    [WITHOUT_TRITON, ON_A_CPU, OPERATORS_ARE_SOUND, MANY_KEYS_ARE_ONE_GRAPH],
    ids=["without_triton", "on_a_cpu", "operators_are_sound", "many_keys"],
)
def test_references_alone(program):
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "program",
    [KERNELS_ARE_FOUND, ONE_GRAPH, OPERATORS_ARE_SOUND],
    ids=["kernels_are_found", "one_graph", "operators_are_sound"],
)
def test_a_build_with_cuda(program):
    result = run("-c", AS_IN_A_BUILD_WITH_CUDA + program)
    assert result.returncode == 0, result.stderr


def test_a_function_is_marked_as_torch_would():
    def ours(): ...

    def theirs(): ...

    assert vars(constant_in_graphs(ours)) == vars(torch.compiler.assume_constant_result(theirs)) != {}


def test_collection_fails_where_no_kernel_could_run():
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "test_philox.py"))
    assert result.returncode == pytest.ExitCode.USAGE_ERROR
    assert "TRITON_INTERPRET=1 pytest tests/kernels" in result.stderr + result.stdout
    assert "passed" not in result.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows the refusal on a machine without a GPU")
def test_gpu_tests_fail_without_a_gpu():
    file = str(HERE / "test_on_gpu.py")
    result = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "start_up", file, interpret="1")
    assert result.returncode == pytest.ExitCode.TESTS_FAILED
    assert "marked gpu and there is none" in result.stdout


AS_IF_THERE_WERE_A_GPU = "import pytest, sys, torch; torch.cuda.is_available = lambda: True; sys.exit(pytest.main({}))"


def test_on_a_gpu_the_comparisons_with_fp64_are_gpu_tests():
    options = ["--collect-only", "-q", "-p", "no:cacheprovider", "-m", "gpu", str(HERE)]
    result = run("-c", AS_IF_THERE_WERE_A_GPU.format(options))
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    taken = {line.split("::")[0].split("/")[-1] for line in result.stdout.splitlines() if "agrees_with_fp64" in line}
    kernels = ("adamw_ema", "attention", "group_norm_silu", "guided_step", "squared_norm")
    assert taken == {f"test_{kernel}.py" for kernel in kernels}
    assert "test_campaign" not in result.stdout and "test_references_alone" not in result.stdout
