"""Where a call goes, and what is said about it; each claim in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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
# torch.compile's caches ask for these to notice an edited kernel.
KERNELS_ARE_FOUND = """
from torch._library.triton import get_triton_kernels_for_op
from duotone.kernels import attention, group_norm_silu, guided_step
found = {name: len(get_triton_kernels_for_op(f"duotone::{name}")) for name in (
    "group_norm_silu", "group_norm_silu_backward", "attention", "attention_backward", "guided_step")}
assert list(found.values()) == [4, 4, 1, 1, 2], found
"""
# Both passes are traced on tensors without storage, for a chip that is not there, and stopped before anything runs.
ONE_GRAPH = """
import torch, triton
from torch._dynamo.backends.common import aot_autograd
from triton.backends.compiler import GPUTarget
from duotone.kernels import attention, group_norm_silu

class Driver:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

class Stop(BaseException):
    pass

triton.runtime.driver.set_active(Driver())
group_norm_silu.runs_kernel = attention.runs_kernel = lambda *_: True

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
        compiled(*inputs).sum().backward()
    except Stop:
        return seen

def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)

def norm(x_NCHW, row_C, row_NC):
    return group_norm_silu.group_norm_silu(x_NCHW.relu(), row_C, row_C, 16, add_NC=row_NC, scale_NC=row_NC).sin()

for side, launches in ((8, [1, 1]), (40, [2, 2])):
    x_NCHW = empty(2, 64, side, side).detach().to(memory_format=torch.channels_last).requires_grad_()
    assert kernels_seen(norm, x_NCHW, empty(64), empty(2, 64)) == launches
attend = lambda q, k: attention.attention(q.sin(), k, k).cos()
assert kernels_seen(attend, empty(2, 100, 4, 64), empty(2, 77, 4, 64)) == [1, 1]
torch.compiler.reset()
assert kernels_seen(norm, x_NCHW, empty(64), empty(2, 64), dynamic=True) == [2, 2]
assert kernels_seen(attend, empty(3, 90, 4, 32), empty(3, 70, 4, 32), dynamic=True) == [1, 1]
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
    [WITHOUT_TRITON, ON_A_CPU, KERNELS_ARE_FOUND, ONE_GRAPH],
    ids=["without_triton", "on_a_cpu", "kernels_are_found", "one_graph"],
)
def test_references_alone(program):
    result = run("-c", program)
    assert result.returncode == 0, result.stderr


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
