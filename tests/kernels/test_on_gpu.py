"""What only a GPU can show: operators as torch.compile sees them, and the same bits from run to run.

The other files of this folder run on a GPU too, compiled instead of interpreted: `pytest tests/kernels`.
"""

from functools import partial
from importlib.util import find_spec

import pytest
import torch

from duotone.kernels import attention, attention_backends, diffuse, group_norm_silu, guided_step, philox
from duotone.kernels.self_test import self_test
from duotone.kernels.squared_norm import squared_norm

pytestmark = pytest.mark.gpu


def norm_inputs(dtype=torch.bfloat16, images=4, channels=128, side=32):
    x_NCHW = torch.randn(images, channels, side, side, device="cuda").to(dtype)
    x_NCHW = x_NCHW.contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(channels, device="cuda") for _ in range(2)]
    modulation = [torch.randn(images, channels, device="cuda") for _ in range(3)]
    return [t.requires_grad_() for t in (x_NCHW, *weights, *modulation)]


def norm(x_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, in_turns=False):
    return group_norm_silu.group_norm_silu(
        x_NCHW, weight_C, bias_C, 32, add_NC=add_NC, scale_NC=scale_NC, shift_NC=shift_NC, in_turns=in_turns
    )


norm_in_turns = partial(norm, in_turns=True)


def joined_norm(x_NCHW, weight_C, bias_C, add_NC, scale_NC, shift_NC, in_turns=False):
    """The norm of an image in two parts, whose border runs through a group; joined image and norm as one tensor."""
    parts = [part.contiguous(memory_format=torch.channels_last) for part in x_NCHW.tensor_split([50], dim=1)]
    modulation = {"add_NC": add_NC, "scale_NC": scale_NC, "shift_NC": shift_NC}
    y_NCHW, joined_NCHW = group_norm_silu.joined_group_norm_silu(
        *parts, weight_C, bias_C, 32, **modulation, in_turns=in_turns
    )
    return y_NCHW + joined_NCHW


joined_in_turns = partial(joined_norm, in_turns=True)
WAYS = {"norm": norm, "in_turns": norm_in_turns, "joined": joined_norm, "joined_in_turns": joined_in_turns}


def attention_inputs(dtype=torch.bfloat16, images=3, queries=300, keys=77, width=64):
    lengths = (queries, keys, keys)
    tokens = [torch.randn(images, n, 4, width, device="cuda").to(dtype).requires_grad_() for n in lengths]
    return tokens, torch.arange(keys, device="cuda") < torch.tensor([[0], [5], [keys]], device="cuda")[:images]


def both_passes(function, leaves, gradient):
    out = function(*leaves)
    return out, *torch.autograd.grad(out, leaves, gradient)


SUMMED = {"rtol": 1e-5, "atol": 1e-4}
"""For gradients that were summed in another order: 3.5e-6 apart on an H200, where opcheck's own bound is 1.3e-6."""


def test_operators_are_sound():
    inputs = norm_inputs(torch.float32, images=2, channels=32, side=8)
    x_NCHW, *rest = inputs
    torch.library.opcheck(torch.ops.duotone.group_norm_silu.default, (x_NCHW, None, *rest, 8, 1e-5, True, False))
    x_NCHW, *rest = norm_inputs(torch.float32, images=2, channels=64, side=40)
    torch.library.opcheck(
        torch.ops.duotone.group_norm_silu.default, (x_NCHW, None, *rest, 8, 1e-5, True, True), **SUMMED
    )
    parts = [part.detach().clone(memory_format=torch.channels_last) for part in x_NCHW.tensor_split([20], dim=1)]
    parts = [part.requires_grad_() for part in parts]
    torch.library.opcheck(torch.ops.duotone.group_norm_silu.default, (*parts, *rest, 8, 1e-5, True, False))
    tokens, mask_NM = attention_inputs(images=3, queries=40)
    torch.library.opcheck(torch.ops.duotone.attention.default, (*tokens, mask_NM, 0.125))
    image = torch.zeros(2, 8, 8, 3, dtype=torch.uint8, device="cuda")
    few = [torch.zeros(2, dtype=kind, device="cuda") for kind in (torch.bool, torch.int64)]
    coefficients = torch.ones(2, 4, device="cuda")
    arguments = (image, few[0], coefficients, 3, few[1], 1, torch.bfloat16)
    torch.library.opcheck(torch.ops.duotone.diffuse.default, arguments)
    per_image = [torch.ones(2, device="cuda") for _ in range(3)]
    prediction, x_NCHW = (torch.randn(n, 3, 8, 8, device="cuda") for n in (4, 2))
    torch.library.opcheck(torch.ops.duotone.guided_step.default, (prediction, x_NCHW, *per_image, 0.7))


def test_a_gpu_draws_the_numbers_of_a_cpu():
    positions_N = torch.tensor([0, 7, 2**32 - 1, 2**40 + 17])
    for draw in (philox.normal_reference, philox.uniform_reference):
        assert draw(5, positions_N.cuda(), 3, 4099).cpu().equal(draw(5, positions_N, 3, 4099))


def test_update_operators_are_sound():
    flat = [torch.rand(5000, device="cuda") for _ in range(5)]
    numbers, weights = torch.rand(5, device="cuda"), torch.empty(5000, device="cuda", dtype=torch.bfloat16)
    options = (flat[4:], weights, numbers, 0.9, 0.999, 1e-8, 0.1)
    torch.library.opcheck(torch.ops.duotone.adamw_ema_.default, (*flat[:4], *options))
    torch.library.opcheck(torch.ops.duotone.squared_norm.default, (flat[0],))


def test_norm_of_gradients_gives_the_same_bits_again():
    grad_P = torch.randn(2**22 + 7, device="cuda").bfloat16()
    assert all(squared_norm(grad_P).equal(squared_norm(grad_P)) for _ in range(5))


@pytest.mark.parametrize("side", [8, 64], ids=["on_chip", "chunks"])
@pytest.mark.parametrize("together", [(joined_norm, norm), (joined_in_turns, norm_in_turns)], ids=["two", "in_turns"])
def test_joined_is_the_norm_of_the_concatenation(together, side):
    inputs = norm_inputs(torch.float32, side=side)
    gradient = torch.randn_like(inputs[0])
    joined, whole = (both_passes(norm, inputs, gradient) for norm in together)
    torch.testing.assert_close(joined[0], whole[0] + inputs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joined[1], whole[1] + gradient, rtol=1e-4, atol=1e-4)
    for mine, theirs in zip(joined[2:], whole[2:]):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("norm", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("side", [8, 64], ids=["on_chip", "chunks"])
def test_norm_in_one_compiled_graph(side, norm):
    inputs = norm_inputs(side=side)
    gradient = torch.randn_like(inputs[0])
    eager = both_passes(norm, inputs, gradient)
    compiled = both_passes(torch.compile(norm, fullgraph=True), inputs, gradient)
    for mine, theirs in zip(compiled, eager):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_turns_end_beside_other_work_and_within_a_captured_graph():
    """Thousands of programs, most of which have to wait for a while, with another stream keeping the GPU busy."""
    inputs = [t.detach() for t in norm_inputs(images=64, side=64)]
    expected, beside, square = norm(*inputs), torch.cuda.Stream(), torch.randn(4096, 4096, device="cuda")
    with torch.cuda.stream(beside):
        for _ in range(20):
            square = (square @ square).tanh()
    for _ in range(10):
        torch.testing.assert_close(norm_in_turns(*inputs), expected, rtol=2e-2, atol=2e-2)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = norm_in_turns(*inputs)
    for _ in range(3):
        out.zero_()
        graph.replay()
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-2)


def test_an_installed_xformers_runs():
    if find_spec("xformers") is None:
        pytest.skip("xformers is not installed")
    from xformers import _cpp_lib

    if _cpp_lib._cpp_library_load_exception is not None:
        pytest.skip(f"this xformers was built for another CUDA: {_cpp_lib._cpp_library_load_exception}".splitlines()[0])
    module, reason = attention_backends.xformers()
    assert module is not None, reason


def test_attention_in_one_compiled_graph():
    tokens, mask_NM = attention_inputs()

    def attend(q_NLHD, k_NMHD, v_NMHD):
        return attention.attention(q_NLHD, k_NMHD, v_NMHD, mask_NM=mask_NM)

    gradient = torch.randn_like(tokens[0])
    eager = both_passes(attend, tokens, gradient)
    compiled = both_passes(torch.compile(attend, fullgraph=True), tokens, gradient)
    for mine, theirs in zip(compiled, eager):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_draws_and_guidance_in_one_compiled_graph():
    @torch.compile(fullgraph=True)
    def step(image, flip, coefficients, positions, per_image):
        noisy, target = diffuse.diffuse(image, flip, coefficients, 3, positions, 1)
        return target, guided_step.guided_step(torch.cat([noisy, target]), noisy, per_image, per_image, per_image)

    image = torch.randint(0, 256, (2, 8, 8, 3), dtype=torch.uint8, device="cuda")
    flip, positions = torch.tensor([True, False], device="cuda"), torch.arange(2, device="cuda")
    coefficients, per_image = torch.rand(2, 4, device="cuda"), torch.rand(2, device="cuda")
    with torch.no_grad():
        target, _ = step(image, flip, coefficients, positions, per_image)
    assert target.equal(diffuse.diffuse(image, flip, coefficients, 3, positions, 1)[1])


@pytest.mark.parametrize("norm", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("side", [8, 64, 128], ids=["on_chip", "chunks", "many_chunks"])
def test_norm_gives_the_same_bits_again(side, norm):
    inputs = norm_inputs(side=side)
    gradient = torch.randn_like(inputs[0])
    first = both_passes(norm, inputs, gradient)
    for _ in range(5):
        torch.empty(2**24, device="cuda").fill_(float("nan"))
        assert all(a.equal(b) for a, b in zip(first, both_passes(norm, inputs, gradient)))


@pytest.mark.parametrize("images", [1, 3], ids=["shares", "whole_heads"])
def test_attention_gives_the_same_bits_again(images):
    tokens, _ = attention_inputs(images=images)
    gradient = torch.randn_like(tokens[0])
    first = both_passes(attention.attention, tokens, gradient)
    assert all(a.equal(b) for _ in range(5) for a, b in zip(first, both_passes(attention.attention, tokens, gradient)))


def test_an_image_does_not_depend_on_its_batch():
    """Work is divided by the shape of one image, so its statistics are summed in the same order in any batch."""
    inputs = norm_inputs(images=5, side=64)
    alone = norm(*(t[:1] if t.shape[0] == 5 else t for t in inputs))
    assert norm(*inputs)[:1].equal(alone)


def test_replay_of_a_captured_graph_reads_new_numbers():
    from duotone.kernels.adamw_ema import adamw_ema_

    state = [torch.rand(5000, device="cuda") for _ in range(4)]
    twin = [t.clone() for t in state]
    step, lr = torch.ones((), device="cuda"), torch.full((), 1e-3, device="cuda")
    options = {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    adamw_ema_(*[t.clone() for t in state], lr=lr, step=step, **options)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        adamw_ema_(*state, lr=lr, step=step, **options)
    for number, rate in ((1.0, 1e-3), (2.0, 5e-4), (3.0, 2e-4)):
        step.fill_(number)
        lr.fill_(rate)
        graph.replay()
        adamw_ema_(*twin, lr=rate, step=number, **options)
    for mine, theirs in zip(state, twin):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)


def test_sound_kernels_pass_the_start_up_check():
    assert self_test("cuda") == []


@pytest.mark.parametrize("backend", attention_backends.BACKENDS)
def test_attention_over_many_keys_is_one_graph(backend):
    """With every backend that the measurement may choose; in a compiled graph, the next one replaces xformers."""
    tokens, _ = attention_inputs(images=1, queries=256, keys=256)
    shape = dict(images=1, queries=256, keys=256, heads=4, width=64, dtype=torch.bfloat16, masked=False)
    with torch.inference_mode():
        attention.attention(*tokens)
    wanted = (shape | {"dtype": "torch.bfloat16"}).items()
    (measured,) = (row for row in attention_backends.choices() if wanted <= row.items())
    if backend not in measured["milliseconds"]:
        assert measured["refused"][backend]
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(attention_backends._choices[tuple(shape.values())], "backend", backend)
        expected = attention.attention_reference(*tokens)
        torch._dynamo.reset()
        out = torch.compile(attention.attention, fullgraph=True)(*tokens)
    assert (out - expected).norm() <= 0.02 * expected.norm()


def test_a_kernel_runs_where_its_tensors_are():
    """Triton launches on the current device, which in this test is another one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    assert self_test("cuda:1") == [] and torch.cuda.current_device() == 0
