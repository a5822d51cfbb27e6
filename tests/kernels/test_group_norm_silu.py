"""group_norm_silu against its definition in fp64: values, every gradient, every switch, every layout."""

from functools import partial
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from duotone.engine.model.blocks import GroupNormSiLU
from duotone.engine.model.unet import UNetConfig
from duotone.kernels import dispatch, group_norm_tiling
from duotone.kernels.group_norm_silu import (
    CASES,
    NAME,
    group_norm_silu,
    group_norm_silu_reference,
    joined_group_norm_silu,
)
from duotone.kernels.group_norm_tiling import tiling

CHECKED = [case for case in CASES if not case.timed]
BY_NAME = {case.name: case for case in CASES}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# These dtypes only differ in how a number is read and written, which the plain norms test in every dtype.
TWO_DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.long)]
MODULATION = ("add_NC", "scale_NC", "shift_NC")


def channels_last(x_NCHW):
    return x_NCHW.contiguous(memory_format=torch.channels_last)


def sliced(x_NCHW):
    return channels_last(torch.cat([x_NCHW, x_NCHW], dim=1))[:, : x_NCHW.shape[1]]


def cropped(x_NCHW):
    return channels_last(F.pad(x_NCHW, (1, 2, 1, 1)))[:, :, 1:-1, 1:-2]


LAYOUTS = {f.__name__: f for f in (channels_last, sliced, cropped)} | {"contiguous": torch.Tensor.contiguous}


def draw(case, device, dtype, offset=0.0):
    """Image, weights and modulation: weights in fp32, all else in the image's dtype; modulation is chunks of a tensor."""
    images, channels = case.shape[:2]
    x_NCHW = (torch.randn(case.shape, device=device) * 1.5 + offset).to(dtype)
    weights = {name: torch.randn(channels, device=device) for name in ("weight_C", "bias_C")}
    chunks = torch.randn(images, 3 * channels, device=device).to(dtype).chunk(3, dim=1)
    return {"x_NCHW": x_NCHW} | weights | dict(zip(MODULATION, chunks))


def differentiate(function, inputs, case, dy_NCHW, silu=True, dtype=None):
    """Output and gradients of every input, by name."""
    leaves = {name: (t.to(dtype) if dtype else t).detach().requires_grad_() for name, t in inputs.items()}
    y_NCHW = function(**leaves, groups=case.groups, silu=silu)
    gradients = torch.autograd.grad(y_NCHW, leaves.values(), dy_NCHW.to(y_NCHW.dtype))
    return {"y": y_NCHW.detach()} | {f"d{name}": g for name, g in zip(leaves, gradients)}


def compare(case, inputs, dy_NCHW, agree, launching, silu=True, arithmetic=1e-5, norm=group_norm_silu):
    with launching(NAME):
        got = differentiate(norm, inputs, case, dy_NCHW, silu)
    exact = differentiate(group_norm_silu_reference, inputs, case, dy_NCHW, silu, torch.float64)
    for name, value in got.items():
        agree(value, exact[name], name, arithmetic, scale=_scale(exact, name))
    return got


def _scale(exact, name):
    """The gradient of `add` sums the image's: with one channel per group it may be exactly 0, its terms are not."""
    terms = exact["dx_NCHW"].abs().sum(dim=(2, 3)) if name == "dadd_NC" else exact[name].abs()
    return terms.amax()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, dtype, device, agree, launching):
    inputs = draw(case, device, dtype)
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    dy_NCHW = channels_last(torch.randn(case.shape, device=device).to(dtype))
    got = compare(case, inputs, dy_NCHW, agree, launching)
    if case.shape[2] > 1:
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert got["dx_NCHW"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "cropped"])
@pytest.mark.parametrize("name", ["odd_map", "chunks_odd_groups"])
def test_every_layout(name, layout, device, agree, launching):
    case = BY_NAME[name]
    inputs = draw(case, device, torch.bfloat16)
    inputs["x_NCHW"] = LAYOUTS[layout](inputs["x_NCHW"])
    compare(case, inputs, torch.randn(case.shape, device=device).bfloat16(), agree, launching)


@pytest.mark.parametrize("add,scale,shift,silu", list(product([False, True], repeat=4)))
def test_every_switch(add, scale, shift, silu, device, agree, launching):
    case = BY_NAME["three_per_group"]
    inputs = draw(case, device, torch.float32)
    for name, present in zip(MODULATION, (add, scale, shift)):
        if not present:
            del inputs[name]
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    compare(case, inputs, torch.randn(case.shape, device=device), agree, launching, silu)


@pytest.mark.parametrize("gradient", ["contiguous", "sliced", "cropped", "one_number", "per_channel"])
@pytest.mark.parametrize("name", ["odd_map", "chunks_odd_groups"])
def test_gradients_of_any_stride(name, gradient, device, agree, launching):
    case = BY_NAME[name]
    inputs = draw(case, device, torch.float32)
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    dy_NCHW = torch.randn(case.shape, device=device)
    if gradient == "one_number":
        dy_NCHW = dy_NCHW[:1, :1, :1, :1].expand(case.shape)
    elif gradient == "per_channel":
        dy_NCHW = dy_NCHW[:, :, :1, :1].expand(case.shape)
    else:
        dy_NCHW = LAYOUTS[gradient](dy_NCHW)
    compare(case, inputs, dy_NCHW, agree, launching)


@pytest.mark.parametrize("name", ["four_per_group", "chunks"])
def test_statistics_do_not_cancel(name, device, agree, launching):
    """Images 2,000 standard deviations from zero: E[x^2] - E[x]^2 in fp32 would lose every digit.

    There, the mean's last bit is 1.6e-4 of a deviation. The gain, which multiplies this error, is kept to at most 2.
    """
    case = BY_NAME[name]
    inputs = draw(case, device, torch.float32, offset=3000.0)
    for gain in ("weight_C", "scale_NC"):
        inputs[gain] = inputs[gain].clamp(-1, 1)
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    compare(case, inputs, torch.randn(case.shape, device=device), agree, launching, arithmetic=3e-4)


def test_the_output_on_chip_is_not_limited_by_the_means_last_bit(device, agree, launching):
    """At 3,000 the mean's last bit is 1e-4 of a deviation; the output is accurate to a tenth of that."""
    case = BY_NAME["four_per_group"]
    inputs = draw(case, device, torch.float32, offset=3000.0)
    del inputs["add_NC"]
    with launching(NAME, launches=1), torch.no_grad():
        y_NCHW = group_norm_silu(**inputs, groups=case.groups)
    wide = {name: value.double() for name, value in inputs.items()}
    agree(y_NCHW, group_norm_silu_reference(**wide, groups=case.groups), "y", 1e-5)


@pytest.mark.parametrize("with_add", [False, True], ids=["plain", "add"])
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_the_definition_does_not_cancel_either(layout, with_add, agree):
    """A hundred deviations from zero, in fp32 on a CPU: PyTorch's own channels-last norm is off by 5 % of a deviation."""
    case = BY_NAME["four_per_group"]
    inputs = draw(case, "cpu", torch.float32, offset=150.0)
    inputs["x_NCHW"] = LAYOUTS[layout](inputs["x_NCHW"])
    if not with_add:
        del inputs["add_NC"]
    dy_NCHW = torch.randn(case.shape)
    got = differentiate(group_norm_silu_reference, inputs, case, dy_NCHW)
    exact = differentiate(group_norm_silu_reference, inputs, case, dy_NCHW, dtype=torch.float64)
    for name, value in got.items():
        agree(value, exact[name], name, 1e-4, scale=_scale(exact, name))


def test_one_outlier_does_not_cancel(device, agree, launching):
    """Shifting by the first element or the first row would not save the statistics from this pixel."""
    case = BY_NAME["chunks"]
    inputs = draw(case, device, torch.float32)
    inputs["x_NCHW"][:, :, 0, 0] = 1e4
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    compare(case, inputs, torch.randn(case.shape, device=device), agree, launching)


def test_shared_modulation(device, agree, launching):
    """Two norms with the same scale and shift: their gradients must add up (silently wrong in some compilers)."""
    case = BY_NAME["four_per_group"]
    inputs = draw(case, device, torch.float32)
    del inputs["add_NC"]

    def twice(x_NCHW, weight_C, bias_C, scale_NC, shift_NC, norm):
        h_NCHW = norm(x_NCHW, weight_C, bias_C, case.groups, scale_NC=scale_NC, shift_NC=shift_NC)
        return norm(h_NCHW, weight_C, bias_C, case.groups, scale_NC=scale_NC, shift_NC=shift_NC).sin().sum()

    def gradients(norm, dtype):
        leaves = {name: value.to(dtype).detach().requires_grad_() for name, value in inputs.items()}
        return torch.autograd.grad(twice(**leaves, norm=norm), leaves.values())

    with launching(NAME):
        got = gradients(group_norm_silu, torch.float32)
    for name, mine, exact in zip(inputs, got, gradients(group_norm_silu_reference, torch.float64)):
        agree(mine, exact, name, 5e-5)


def test_modulation_broadcast_over_images(device, agree, launching):
    case = BY_NAME["odd_map"]
    inputs = draw(case, device, torch.float32)
    one_1C = inputs["scale_NC"][:1].detach().requires_grad_()
    scale_NC = one_1C.expand(case.shape[0], -1)
    with launching(NAME):
        y = group_norm_silu(inputs["x_NCHW"], inputs["weight_C"], inputs["bias_C"], case.groups, scale_NC=scale_NC)
        (got,) = torch.autograd.grad(y.sum(), one_1C)
    wide_1C = one_1C.detach().double().requires_grad_()
    wide = [inputs[name].double() for name in ("x_NCHW", "weight_C", "bias_C")]
    y = group_norm_silu_reference(*wide, case.groups, scale_NC=wide_1C.expand(case.shape[0], -1))
    agree(got, torch.autograd.grad(y.sum(), wide_1C)[0], "dscale")


def test_weights_of_any_stride(device, agree, launching):
    case = BY_NAME["odd_map"]
    inputs = draw(case, device, torch.float32)
    x_NCHW, bias_C = inputs["x_NCHW"], inputs["bias_C"].repeat_interleave(2)[::2]
    weight_C = torch.randn(1, device=device).expand_as(bias_C)
    scale_NC = inputs["scale_NC"].t().contiguous().t()
    with launching(NAME):
        y_NCHW = group_norm_silu(x_NCHW, weight_C, bias_C, case.groups, scale_NC=scale_NC)
    wide = [t.double() for t in (x_NCHW, weight_C, bias_C)]
    agree(y_NCHW, group_norm_silu_reference(*wide, case.groups, scale_NC=scale_NC.double()), "y")


def test_each_weight_gets_its_gradient_in_its_own_type(device, launching):
    """The bias's gradient, a sum over the image, may overflow in the dtype of a half-precision gain."""
    x_NCHW = channels_last(torch.randn(2, 16, 8, 8, device=device))
    weight_C, bias_C = torch.ones(16, device=device, dtype=torch.float16), torch.zeros(16, device=device)
    leaves = [weight_C.requires_grad_(), bias_C.requires_grad_()]
    with launching(NAME):
        y_NCHW = group_norm_silu(x_NCHW, *leaves, 4, silu=False)
    dweight_C, dbias_C = torch.autograd.grad(y_NCHW, leaves, torch.full_like(y_NCHW, 3e3))
    assert dweight_C.dtype == torch.float16 and dbias_C.dtype == torch.float32
    torch.testing.assert_close(dbias_C, torch.full_like(dbias_C, 3e3 * 128))


def test_pixels_that_lie_too_far_apart_go_to_the_reference(device):
    """Such pixels belong to a view of a larger tensor; a program's offsets have 32 bits."""
    x_NCHW, row_C = torch.randn(1, 4, 3, 2, device=device).bfloat16(), torch.ones(4, device=device)
    far_NCHW = torch.empty_strided(x_NCHW.shape, (1, 1, 2**30, 4), dtype=x_NCHW.dtype, device=device)  # never touched
    found = group_norm_silu(far_NCHW.copy_(x_NCHW), row_C, row_C, 2)
    assert "farther apart" in dispatch.fallbacks()[-1]["reason"]
    torch.testing.assert_close(found, group_norm_silu(x_NCHW, row_C, row_C, 2), rtol=1e-2, atol=1e-2)
    near_NCHW = channels_last(x_NCHW).requires_grad_()
    group_norm_silu(near_NCHW, row_C, row_C, 2).backward(far_NCHW)
    (wanted,) = torch.autograd.grad(group_norm_silu(near_NCHW, row_C, row_C, 2), near_NCHW, channels_last(x_NCHW))
    assert near_NCHW.grad.equal(wanted)


@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous], ids=["channels_last", "contiguous"])
def test_the_definition_gives_weights_alone_their_gradients(layout):
    """A frozen layer precedes the norm: on a CPU, PyTorch's own backward pass would crash the process."""
    x_NCHW, rows = layout(torch.randn(2, 8, 5, 7)), [torch.randn(8, requires_grad=True) for _ in range(2)]
    wide = [row.detach().double().requires_grad_() for row in rows]
    found = torch.autograd.grad(group_norm_silu_reference(x_NCHW, *rows, 4).sum(), rows)
    exact = torch.autograd.grad(F.silu(F.group_norm(x_NCHW.double().contiguous(), 4, *wide)).sum(), wide)
    for mine, theirs in zip(found, exact):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_the_definition_draws_the_same_whether_or_not_weights_are_trained():
    """Without gradients, the definition needs no workaround."""
    x_NCHW, rows = channels_last(torch.randn(2, 64, 9, 7)), [torch.randn(64, requires_grad=True) for _ in range(2)]
    with torch.no_grad():
        drawn = group_norm_silu_reference(x_NCHW, *rows, 8)
    assert drawn.equal(group_norm_silu_reference(x_NCHW, *(row.detach() for row in rows), 8))


def test_no_gradient_asked_for_none_computed(device, launching):
    case = BY_NAME["odd_map"]
    inputs = draw(case, device, torch.float32)
    with launching(NAME, launches=1), torch.no_grad():
        group_norm_silu(**inputs, groups=case.groups)


def test_small_slabs_take_one_launch_large_ones_two():
    assert tiling(384, 32, 64, 2).chunks == 0
    assert tiling(384, 32, 256, 2).chunks == 0
    assert tiling(128, 32, 128 * 128, 2).chunks > 1


@pytest.mark.parametrize("channels,groups", [(128, 32), (256, 32), (384, 32), (512, 32), (96, 32), (320, 32)])
def test_programs_own_whole_groups_and_fill_cache_lines(channels, groups):
    cut = tiling(channels, groups, 4096, 2)
    assert cut.span % (channels // groups) == 0 and channels % cut.span == 0
    assert cut.span * 2 >= 128


@pytest.fixture
def in_turns(monkeypatch):
    """The norm in one launch, first passes one slab ahead: first passes alone, then both, then second passes alone."""
    monkeypatch.setattr(group_norm_tiling, "_CHUNKS_AHEAD", 1)
    return partial(group_norm_silu, in_turns=True)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("name", ["chunks", "chunks_odd_groups"])
def test_in_turns_agrees_with_fp64(name, dtype, in_turns, device, agree, launching):
    case = BY_NAME[name]
    inputs = draw(case, device, dtype)
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    dy_NCHW = channels_last(torch.randn(case.shape, device=device).to(dtype))
    with launching(NAME, launches=2):
        compare(case, inputs, dy_NCHW, agree, launching, norm=in_turns)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "cropped"])
def test_every_layout_in_turns(layout, in_turns, device, agree, launching):
    case = BY_NAME["chunks_odd_groups"]
    inputs = draw(case, device, torch.float32)
    inputs["x_NCHW"] = LAYOUTS[layout](inputs["x_NCHW"])
    dy_NCHW = LAYOUTS[layout](torch.randn(case.shape, device=device))
    with launching(NAME, launches=2):
        compare(case, inputs, dy_NCHW, agree, launching, silu=False, norm=in_turns)


@pytest.mark.parametrize("absent", ["add_NC", "scale_NC", "shift_NC"])
def test_every_switch_in_turns(absent, in_turns, device, agree, launching):
    case = BY_NAME["chunks"]
    inputs = draw(case, device, torch.float32)
    del inputs[absent]
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    with launching(NAME, launches=2):
        compare(case, inputs, torch.randn(case.shape, device=device), agree, launching, norm=in_turns)


def test_in_turns_an_image_does_not_depend_on_its_batch(in_turns, device, launching):
    case = BY_NAME["chunks"]
    inputs = draw(case, device, torch.float32)
    alone = {name: value[:1] if value.shape[0] == case.shape[0] else value for name, value in inputs.items()}
    with launching(NAME, launches=2):
        both, one = (in_turns(**i, groups=case.groups) for i in (inputs, alone))
    assert both[:1].equal(one)


def test_maps_that_no_cache_holds_take_two_launches(monkeypatch, in_turns, device, agree, launching):
    monkeypatch.setattr(group_norm_tiling, "_KEPT_BYTES", 1000)
    case = BY_NAME["chunks"]
    inputs = draw(case, device, torch.float32)
    with launching(NAME, launches=4):
        compare(case, inputs, torch.randn(case.shape, device=device), agree, launching, norm=in_turns)


# ---------------------------------------------------------------------------------------------------------- joined

BORDERS = [
    ("four_per_group", 64, "the border between two programs"),
    ("three_per_group", 40, "a border within a group, within a program"),
    ("idle_lanes", 65, "a border that aligns with nothing"),
    ("one_pixel", 24, "a 1x1 map"),
    ("one_group", 1, "one channel, then 23"),
    ("chunks", 32, "two launches"),
    ("chunks_odd_groups", 61, "two launches, a border within a group"),
]
joined_in_turns = partial(joined_group_norm_silu, in_turns=True)


def joined_reference(x_NCHW, skip_NCHW, weight_C, bias_C, groups, **options):
    joined_NCHW = torch.cat([x_NCHW, skip_NCHW], dim=1)
    return group_norm_silu_reference(joined_NCHW, weight_C, bias_C, groups, **options), joined_NCHW


def in_parts(inputs, border):
    """The same inputs with the image in two parts, each dense and channels-last."""
    x_NCHW, skip_NCHW = (channels_last(part) for part in inputs["x_NCHW"].tensor_split([border], dim=1))
    return {"x_NCHW": x_NCHW, "skip_NCHW": skip_NCHW} | {k: v for k, v in inputs.items() if k != "x_NCHW"}


def differentiate_joined(function, inputs, case, gradients, silu=True, dtype=None):
    """Both outputs and gradients of every input, by name."""
    leaves = {name: (t.to(dtype) if dtype else t).detach().requires_grad_() for name, t in inputs.items()}
    outputs = function(**leaves, groups=case.groups, silu=silu)
    found = torch.autograd.grad(outputs, leaves.values(), [g.to(y.dtype) for g, y in zip(gradients, outputs)])
    return {"y": outputs[0].detach(), "joined": outputs[1].detach()} | {f"d{n}": g for n, g in zip(leaves, found)}


def compare_joined(case, inputs, agree, launching, norm=joined_group_norm_silu, gradients=None, launches=None, **silu):
    drawn = (torch.randn(case.shape, device=inputs["x_NCHW"].device).to(inputs["x_NCHW"].dtype) for _ in range(2))
    gradients = gradients or [channels_last(gradient) for gradient in drawn]
    with launching(NAME, launches):
        got = differentiate_joined(norm, inputs, case, gradients, **silu)
    exact = differentiate_joined(joined_reference, inputs, case, gradients, dtype=torch.float64, **silu)
    assert got["joined"].double().equal(exact["joined"])
    for name, value in got.items():
        scale = exact["dx_NCHW"].abs().sum(dim=(2, 3)).amax() if name == "dadd_NC" else None
        agree(value, exact[name], name, scale=scale)
    for name in ("y", "joined", "dx_NCHW", "dskip_NCHW"):
        assert got[name].is_contiguous(memory_format=torch.channels_last), name
    return got


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("name,border,why", BORDERS, ids=lambda value: str(value).replace(" ", "_"))
def test_joined_agrees_with_fp64(name, border, why, dtype, device, agree, launching):
    case = BY_NAME[name]
    inputs = in_parts(draw(case, device, dtype), border)
    is_large = name.startswith("chunks")
    compare_joined(case, inputs, agree, launching, launches=4 if is_large else 2)


@pytest.mark.parametrize("dtype", TWO_DTYPES, ids=str)
@pytest.mark.parametrize("name,border", [("chunks", 32), ("chunks_odd_groups", 61)])
def test_joined_in_turns_agrees_with_fp64(name, border, dtype, in_turns, device, agree, launching):
    case = BY_NAME[name]
    inputs = in_parts(draw(case, device, dtype), border)
    compare_joined(case, inputs, agree, launching, norm=joined_in_turns, launches=2)


@pytest.mark.parametrize("add,scale,shift,silu", list(product([False, True], repeat=4)))
def test_joined_with_every_switch(add, scale, shift, silu, device, agree, launching):
    case = BY_NAME["three_per_group"]
    inputs = in_parts(draw(case, device, torch.float32), 40)
    for name, present in zip(MODULATION, (add, scale, shift)):
        if not present:
            del inputs[name]
    compare_joined(case, inputs, agree, launching, silu=silu)


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "cropped"])
@pytest.mark.parametrize("name,border", [("odd_map", 24), ("chunks_odd_groups", 61)])
def test_joined_with_gradients_of_any_stride(name, border, layout, device, agree, launching):
    case = BY_NAME[name]
    inputs = in_parts(draw(case, device, torch.float32), border)
    gradients = [LAYOUTS[layout](torch.randn(case.shape, device=device)) for _ in range(2)]
    compare_joined(case, inputs, agree, launching, gradients=gradients)


def test_joined_is_the_norm_of_the_concatenation(device, launching):
    """Bit for bit in the interpreter; compiled, each of the two kernels fuses products and sums in its own way."""
    case = BY_NAME["chunks"]
    inputs = draw(case, device, torch.bfloat16)
    inputs["x_NCHW"] = channels_last(inputs["x_NCHW"])
    with launching(NAME, launches=4), torch.no_grad():
        whole = group_norm_silu(**inputs, groups=case.groups)
        y_NCHW, joined_NCHW = joined_group_norm_silu(**in_parts(inputs, 20), groups=case.groups)
    assert joined_NCHW.equal(inputs["x_NCHW"])
    if device == "cpu":
        assert y_NCHW.equal(whole)
    torch.testing.assert_close(y_NCHW, whole, rtol=2**-7, atol=1e-5)


def test_joined_without_a_gradient_of_its_own(device, agree, launching):
    """Only the norm's output is used: the joined image contributes no gradient."""
    case = BY_NAME["odd_map"]
    inputs = in_parts(draw(case, device, torch.float32), 24)
    dy_NCHW = torch.randn(case.shape, device=device)

    def first(norm, dtype):
        leaves = {name: value.to(dtype).detach().requires_grad_() for name, value in inputs.items()}
        return torch.autograd.grad(norm(**leaves, groups=case.groups)[0], leaves.values(), dy_NCHW.to(dtype))

    with launching(NAME, launches=2):
        got = first(joined_group_norm_silu, torch.float32)
    for name, mine, exact in zip(inputs, got, first(joined_reference, torch.float64)):
        agree(mine, exact, name)


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.long)])
@pytest.mark.parametrize("in_turns", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_network_whose_norms_join_skips_is_the_same_network(in_turns, checkpointing, device, launching, monkeypatch):
    """Borders lie between groups and within one, for maps on chip and in chunks."""
    # TF32 convolutions, which round their factors to 10 bits, would turn a last bit into a larger difference.
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    shape = {"channels": (16, 24), "attention": ("none",) * 2, "heads": (1, 1), "blocks": (1, 1), "depth": (1, 1)}
    unet = UNetConfig(**shape, middle="absent", groups=8, zero_init=False).build().to(device)
    unet.checkpointing = checkpointing
    x_NCHW, dy_NCHW = (torch.randn(1, 3, 40, 40, device=device) for _ in range(2))
    found, counts = [], []
    for joins in (False, True):
        for module in unet.modules():
            if isinstance(module, GroupNormSiLU):
                module.in_turns, module.joins_skips = in_turns, joins
        before = dispatch.launches[NAME]
        with launching(NAME):
            y_NCHW = unet(x_NCHW, torch.zeros(1, device=device))
            found.append([y_NCHW, *torch.autograd.grad(y_NCHW, unet.parameters(), dy_NCHW)])
        counts.append(dispatch.launches[NAME] - before)
    assert counts[0] == counts[1], "joining takes no launch of its own"
    if device == "cpu":
        assert found[0][0].equal(found[1][0])
    for mine, expected in zip(found[1], found[0]):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize(
    "change,reason",
    [
        (lambda skip: skip.contiguous(), "an image and a skip that are not both dense and channels-last"),
        (lambda skip: sliced(skip), "an image and a skip that are not both dense and channels-last"),
        (lambda skip: skip.half(), "an image and a skip of different types"),
    ],
    ids=["contiguous", "sliced", "other_type"],
)
def test_what_cannot_be_read_apart_is_joined_first_and_counted(change, reason, device, agree, monkeypatch):
    monkeypatch.setattr(dispatch, "_fallbacks", {})
    case = BY_NAME["odd_map"]
    inputs = in_parts(draw(case, device, torch.float32), 24)
    inputs["skip_NCHW"] = change(inputs["skip_NCHW"])
    before = dispatch.launches[NAME]
    got = differentiate_joined(joined_group_norm_silu, inputs, case, [torch.ones(case.shape, device=device)] * 2)
    assert dispatch.launches[NAME] - before == 2, "the norm itself is still the kernel's"
    assert [row["reason"] for row in dispatch.fallbacks()] == [reason]
    exact = differentiate_joined(
        joined_reference, inputs, case, [torch.ones(case.shape, device=device)] * 2, dtype=torch.float64
    )
    for name, value in got.items():
        scale = exact["dx_NCHW"].abs().sum(dim=(2, 3)).amax() if name == "dadd_NC" else None
        agree(value, exact[name], name, scale=scale)


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"skip_NCHW": torch.ones(2, 40, 8, 7)}, "skip_NCHW"),
        ({"skip_NCHW": torch.ones(1, 40, 8, 8)}, "skip_NCHW"),
        ({"skip_NCHW": torch.ones(2, 0, 8, 8)}, "skip_NCHW"),
        ({"skip_NCHW": torch.ones(2, 40, 8)}, "skip_NCHW"),
        ({"x_NCHW": torch.ones(2, 24, 8)}, "x_NCHW"),
        ({"groups": 5}, "groups"),
        ({"weight_C": torch.ones(24)}, "weight_C"),
        ({"scale_NC": torch.ones(2, 24)}, "scale_NC"),
    ],
)
def test_joined_refuses_what_cannot_fit(change, argument, device):
    given = {"x_NCHW": torch.ones(2, 24, 8, 8), "skip_NCHW": torch.ones(2, 40, 8, 8)}
    given = {name: channels_last(part) for name, part in given.items()}
    given |= {"weight_C": torch.ones(64), "bias_C": torch.ones(64), "groups": 8}
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in (given | change).items()}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        joined_group_norm_silu(**given)


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"groups": 5}, "groups"),
        ({"groups": 0}, "groups"),
        ({"weight_C": torch.ones(7)}, "weight_C"),
        ({"bias_C": torch.ones(64, 1)}, "bias_C"),
        ({"scale_NC": torch.ones(2, 63)}, "scale_NC"),
        ({"shift_NC": torch.ones(1, 64)}, "shift_NC"),
        ({"add_NC": torch.ones(2, 64, 1, 1)}, "add_NC"),
        ({"x_NCHW": torch.ones(2, 64, 8)}, "x_NCHW"),
        ({"x_NCHW": torch.ones(2, 64, 8, 8, dtype=torch.int32)}, "x_NCHW"),
    ],
)
def test_refuses_what_cannot_fit(change, argument, device):
    given = {"x_NCHW": torch.ones(2, 64, 8, 8), "weight_C": torch.ones(64), "bias_C": torch.ones(64), "groups": 8}
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in (given | change).items()}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        group_norm_silu(**given)


def test_what_no_kernel_covers_is_counted_once_per_shape(device):
    x_NCHW = torch.randn(1, 8, 4, 4, dtype=torch.float64, device=device)
    weight_C = torch.ones(8, device=device)
    for _ in range(3):
        y_NCHW = group_norm_silu(x_NCHW, weight_C, weight_C, 2)
    assert y_NCHW.dtype == torch.float64
    rows = [row for row in dispatch.fallbacks() if row["shape"] == [1, 8, 4, 4]]
    assert rows == [{"kernel": NAME, "reason": "torch.float64 images", "shape": [1, 8, 4, 4]}]


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_campaign(case, dtype, layout, device, agree, launching):
    for silu, dy_layout in product([False, True], LAYOUTS):
        inputs = draw(case, device, dtype, offset=0.5)
        inputs["x_NCHW"] = LAYOUTS[layout](inputs["x_NCHW"])
        dy_NCHW = LAYOUTS[dy_layout](torch.randn(case.shape, device=device).to(dtype))
        compare(case, inputs, dy_NCHW, agree, launching, silu)
