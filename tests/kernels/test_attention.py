"""attention against its definition in fp64: values, every gradient, masks, head widths, strides."""

import json
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F

from duotone.kernels import dispatch
from duotone.kernels.attention import (
    CASES,
    NAME,
    attention,
    attention_reference,
    fits,
    tiling,
)
from duotone.kernels.attention_backends import (
    BACKENDS,
    backend_to_run,
    choices,
    choose,
    keep_choices,
    measured_on,
    xformers,
)
from duotone.kernels.attention_backends import _backend as backend_of

CHECKED = [case for case in CASES if not case.timed]
BY_NAME = {case.name: case for case in CASES}
# Attention weights are rounded to the images' dtype between the two products, as in every fused kernel.
# On a GPU, fp32 goes to PyTorch's kernels; only the interpreter shows this kernel's own fp32 arithmetic.
ARITHMETIC = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}
FINEST = torch.float32 if dispatch.INTERPRETED else torch.float16


def draw(case, device, dtype):
    """Query, key, value, mask; in a masked case the last image attends to nothing."""
    tokens = [torch.randn(case.images, n, case.heads, case.width, device=device).to(dtype) for n in _lengths(case)]
    if not case.masked:
        return tokens, None
    length_N = torch.randint(1, case.keys + 1, (case.images,), device=device)
    length_N[-1] = 0
    return tokens, torch.arange(case.keys, device=device) < length_N[:, None]


def _lengths(case):
    return case.queries, case.keys, case.keys


def differentiate(function, tokens, mask_NM, dout_NLHD, dtype=None, **options):
    leaves = [(t.to(dtype) if dtype else t).detach().requires_grad_() for t in tokens]
    out_NLHD = function(*leaves, mask_NM=mask_NM, **options)
    return out_NLHD.detach(), *torch.autograd.grad(out_NLHD, leaves, dout_NLHD.to(out_NLHD.dtype))


def compare(tokens, mask_NM, dout_NLHD, agree, launching, arithmetic=None, **options):
    with launching(NAME, launches=2):
        got = differentiate(attention, tokens, mask_NM, dout_NLHD, **options)
    return compare_with_fp64(got, tokens, mask_NM, dout_NLHD, agree, arithmetic, **options)


def compare_with_fp64(got, tokens, mask_NM, dout_NLHD, agree, arithmetic=None, **options):
    exact = differentiate(attention_reference, tokens, mask_NM, dout_NLHD, torch.float64, **options)
    for name, mine, truth in zip(("out", "dq", "dk", "dv"), got, exact):
        # Over a single key the weight is 1 and dq, dk are 0: judge their errors relative to dv.
        scale = (
            truth.abs().amax() if name in ("out", "dv") else torch.maximum(truth.abs().amax(), exact[3].abs().amax())
        )
        agree(mine, truth, name, arithmetic or ARITHMETIC[mine.dtype], scale=scale)
    return got


def test_tokens_that_lie_too_far_apart_go_to_the_reference(device):
    """A program's offsets have 32 bits. A gradient with such strides is made dense first."""
    dtype, near = FINEST, [torch.randn(1, n, 2, 16, device=device) for n in (3, 5, 5)]
    near = [tokens.to(dtype).requires_grad_() for tokens in near]
    far_NLHD = torch.empty_strided((1, 3, 2, 16), (1, 2**30, 16, 1), dtype=dtype, device=device)  # never touched
    wanted = attention(*near)
    found = attention(far_NLHD.copy_(near[0].detach()), *near[1:])
    assert "farther apart" in dispatch.fallbacks()[-1]["reason"]
    torch.testing.assert_close(found, wanted, rtol=1e-2, atol=1e-2)
    gradients = [torch.autograd.grad(attention(*near), near, dout) for dout in (far_NLHD, near[0].detach())]
    assert all(one.equal(other) for one, other in zip(*gradients))


@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, dtype, device, agree, launching):
    tokens, mask_NM = draw(case, device, dtype)
    dout_NLHD = torch.randn_like(tokens[0])
    if dtype == torch.float32 != FINEST:
        got = differentiate(attention, tokens, mask_NM, dout_NLHD)
        compare_with_fp64(got, tokens, mask_NM, dout_NLHD, agree, arithmetic=2e-3)
        return
    out, dq, dk, dv = compare(tokens, mask_NM, dout_NLHD, agree, launching)
    if case.masked:
        for nothing in (out[-1], dq[-1], dk[-1], dv[-1]):
            assert not nothing.any(), "a row that attends to nothing gives 0 and takes no gradient"


def test_packed_projection_is_read_in_place(device, agree, launching):
    """Query, key and value as slices of one projection, queries as a view of a contiguous feature map."""
    packed_NLHD = torch.randn(2, 49, 2, 3 * 16, device=device).to(FINEST)
    tokens = list(packed_NLHD.chunk(3, dim=-1))
    map_NCHW = torch.randn(2, 32, 7, 7, device=device).to(FINEST)
    tokens[0] = map_NCHW.flatten(2).transpose(1, 2).unflatten(-1, (2, 16))
    compare(tokens, None, torch.randn(2, 49, 2, 16, device=device).to(FINEST), agree, launching)


def test_each_token_tensor_has_strides_of_its_own(device, agree, launching):
    """Rows with gaps, heads before tokens, channels before tokens: no two alike."""
    q_NLHD = torch.randn(2, 40, 6, 24, device=device).to(FINEST)[:, :, ::2, :16]
    k_NMHD = torch.randn(2, 3, 33, 16, device=device).to(FINEST).transpose(1, 2)
    v_NMHD = torch.randn(2, 3, 16, 33, device=device).to(FINEST).permute(0, 3, 1, 2)
    mask_NM = torch.rand(33, 2, device=device).t() < 0.7
    compare([q_NLHD, k_NMHD, v_NMHD], mask_NM, torch.randn_like(q_NLHD), agree, launching, scale=0.3)


@pytest.mark.parametrize("gradient", ["one_number", "transposed"])
def test_gradients_of_any_stride(gradient, device, agree, launching):
    tokens, mask_NM = draw(BY_NAME["padded_words"], device, FINEST)
    dout_NLHD = torch.randn((), device=device).to(FINEST).expand(tokens[0].shape)
    if gradient == "transposed":
        dout_NLHD = torch.randn_like(tokens[0].transpose(1, 3)).contiguous().transpose(1, 3)
    compare(tokens, mask_NM, dout_NLHD, agree, launching)


def test_scale_and_large_scores(device, agree, launching):
    """With scores of several hundreds, the row's maximum must be subtracted before the exponential.

    The rounding error of a score becomes the relative error of a weight: hundreds of times that for scores near 1.
    """
    tokens, mask_NM = draw(BY_NAME["padded_words"], device, FINEST)
    tokens[0] = tokens[0] * 30
    arithmetic = 5e-4 if torch.float32 == FINEST else 5e-3
    compare(tokens, mask_NM, torch.randn_like(tokens[0]), agree, launching, arithmetic=arithmetic, scale=0.5)


def test_queries_are_split_only_where_heads_are_few():
    assert tiling(1, 300, 20, 1, 16, backward=True).shares > 1
    assert tiling(64, 1024, 77, 4, 64, backward=True).shares == 1


def test_large_tiles_go_elsewhere_on_chips_with_little_shared_memory():
    """By the ledger, 128 keys of 128 channels take 120 KiB; a Turing has 64, an RTX 99 and an H100 227."""
    turing, rtx, a100, h100 = 65_536, 101_376, 166_912, 232_448
    assert not fits(77, 96, rtx) and fits(77, 64, rtx) and fits(64, 128, rtx)
    assert fits(77, 96, a100) and fits(128, 128, h100)
    assert not fits(16, 128, turing) and not fits(128, 32, turing)


@pytest.mark.parametrize(
    "width,dtype,reason", [(136, FINEST, "more than 128 channels"), (16, torch.float64, "float64")]
)
def test_what_no_kernel_covers_goes_elsewhere_and_is_counted_once(width, dtype, reason, device):
    tokens = [torch.randn(1, n, 2, width, device=device).to(dtype) for n in (32, 20, 20)]
    launches, rows = dispatch.launches[NAME], len(dispatch.fallbacks())
    for _ in range(2):
        out_NLHD = attention(*tokens)
    assert dispatch.launches[NAME] == launches and len(dispatch.fallbacks()) == rows + 1
    row = [row for row in dispatch.fallbacks() if row["kernel"] == NAME][-1]
    assert reason in row["reason"] and row["shape"] == [1, 32, 2, width, 20]
    torch.testing.assert_close(out_NLHD, attention_reference(*tokens), rtol=2e-3, atol=2e-3)


def test_many_keys_go_to_pytorch(device):
    tokens = [torch.randn(1, n, 2, 16, device=device) for n in (32, 200, 200)]
    before = dispatch.launches[NAME]
    out_NLHD = attention(*tokens)
    assert dispatch.launches[NAME] == before
    torch.testing.assert_close(out_NLHD, attention_reference(*tokens), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tokens", [49, 144, 2304, 9216])
def test_self_attention_over_maps_of_every_size(tokens, device):
    """Only every 97th query of a map is judged: the definition's scores for all of them would not fit in memory."""
    q_NLHD, k_NMHD, v_NMHD = (torch.randn(1, tokens, 1, 8, device=device).to(FINEST) for _ in range(3))
    out_NLHD = attention(q_NLHD, k_NMHD, v_NMHD)[:, ::97]
    expected_NLHD = attention_reference(q_NLHD[:, ::97], k_NMHD, v_NMHD)
    torch.testing.assert_close(out_NLHD, expected_NLHD, rtol=2e-3, atol=2e-3)


def test_a_mask_over_many_keys_counts_for_pytorchs_kernels_too(device):
    """The last image attends to nothing: it gets 0 and no gradient, where PyTorch's kernels would return NaN."""
    tokens = [torch.randn(2, n, 2, 16, device=device).to(FINEST) for n in (40, 200, 200)]
    mask_NM = torch.arange(200, device=device) < torch.tensor([[150], [0]], device=device)
    dout_NLHD = torch.randn_like(tokens[0])
    got = differentiate(attention, tokens, mask_NM, dout_NLHD)
    exact = differentiate(attention_reference, tokens, mask_NM, dout_NLHD, torch.float64)
    for mine, truth in zip(got, exact):
        torch.testing.assert_close(mine.double(), truth, rtol=5e-3, atol=5e-3)
        assert not mine[1].any()


def test_unmasked_equals_pytorch(device, launching):
    tokens, _ = draw(BY_NAME["words"], device, FINEST)
    with launching(NAME):
        out_NLHD = attention(*tokens)
    theirs_NHLD = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tokens))
    apart = 1e-5 if torch.float32 == FINEST else 2e-3
    torch.testing.assert_close(out_NLHD, theirs_NHLD.transpose(1, 2), rtol=apart, atol=apart)


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"q_NLHD": torch.ones(2, 4, 8)}, "q_NLHD"),
        ({"q_NLHD": torch.ones(2, 4, 2, 8, dtype=torch.int64)}, "q_NLHD"),
        ({"k_NMHD": torch.ones(2, 5, 3, 8)}, "k_NMHD"),
        ({"k_NMHD": torch.ones(2, 0, 2, 8)}, "k_NMHD"),
        ({"v_NMHD": torch.ones(2, 6, 2, 8)}, "v_NMHD"),
        ({"v_NMHD": torch.ones(2, 5, 2, 8, dtype=torch.float16)}, "v_NMHD"),
        ({"mask_NM": torch.ones(2, 5)}, "mask_NM"),
        ({"mask_NM": torch.ones(2, 4, dtype=torch.bool)}, "mask_NM"),
    ],
)
def test_refuses_what_cannot_fit(change, argument, device):
    given = {"q_NLHD": torch.ones(2, 4, 2, 8), "k_NMHD": torch.ones(2, 5, 2, 8), "v_NMHD": torch.ones(2, 5, 2, 8)}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        attention(**{name: value.to(device) for name, value in (given | change).items()})


def test_refuses_what_lies_on_another_device():
    here, elsewhere = torch.ones(2, 5, 2, 8), torch.ones(2, 5, 2, 8, device="meta")
    mask_NM = torch.ones(2, 5, dtype=torch.bool, device="meta")
    for tokens, mask, argument in (((here, elsewhere, here), None, "k_NMHD"), ((here, here, here), mask_NM, "mask_NM")):
        with pytest.raises(ValueError, match=f"^{argument} must be on cpu"):
            attention(*tokens, mask_NM=mask)


def test_each_shape_is_measured_once_and_a_backend_that_fails_is_named(monkeypatch):
    """As on a GPU, the fastest backend runs, whatever another one raises; a shape is not measured a second time."""
    milliseconds, runs = {"default": 3.0, "flash": 1.0, "cudnn": 2.0}, []

    def time(run, *shape):
        name = next(name for name, backend in BACKENDS.items() if backend is run)
        runs.append(name)
        if name not in milliseconds:
            raise AssertionError(f"{name}: not for this chip\nand more")
        return milliseconds[name]

    monkeypatch.setattr("duotone.kernels.attention_backends._time", time)
    monkeypatch.setattr("duotone.kernels.attention_backends._choices", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    shape = (7, 256, 256, 4, 64, torch.bfloat16, False)
    assert [backend_of(False, 0, *shape) for _ in range(2)] == ["flash", "flash"] and runs == list(BACKENDS)
    (row,) = choices()
    assert (row["images"], row["keys"], row["backend"], row["milliseconds"]) == (7, 256, "flash", milliseconds)
    assert row["refused"] == {n: f"AssertionError: {n}: not for this chip" for n in ("efficient", "xformers")}
    choose("cudnn", **dict(zip(("images", "queries", "keys", "heads", "width", "dtype", "masked"), shape)))
    assert backend_of(False, 0, *shape) == "cudnn"


@pytest.mark.parametrize("backend", ["default", "flash", "efficient", "cudnn"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_every_backend_of_pytorch_computes_the_definition(backend, masked, monkeypatch):
    """Called as on a GPU; whether PyTorch really restricts itself to one kernel, only a GPU can show."""
    monkeypatch.setattr("duotone.kernels.attention_backends.sdpa_kernel", lambda _: nullcontext())
    tokens = [torch.randn(2, n, 3, 16) for n in (40, 150, 150)]
    mask_NM = torch.arange(150) < torch.tensor([[90], [0]]) if masked else None
    out_NLHD = BACKENDS[backend](*tokens, mask_NM, 0.3)
    expected_NLHD = attention_reference(*tokens, mask_NM=mask_NM, scale=0.3)
    torch.testing.assert_close(out_NLHD, expected_NLHD, rtol=1e-5, atol=1e-5)


def test_a_choice_can_be_fixed_and_read():
    shape = {"images": 1, "queries": 2, "keys": 3, "heads": 4, "width": 5, "dtype": torch.bfloat16, "masked": False}
    choose("flash", **shape)
    found = shape | {"dtype": "torch.bfloat16", "backend": "flash", "milliseconds": {}, "refused": {}}
    assert found in json.loads(json.dumps(choices())), "a run's record holds them"
    with pytest.raises(ValueError, match="^backend must be one of default, flash"):
        choose("fastest", **shape)


def test_choices_hold_where_they_were_measured(monkeypatch):
    shape = {"images": 1, "queries": 2, "keys": 300, "heads": 4, "width": 5, "dtype": torch.bfloat16, "masked": False}
    monkeypatch.setattr("duotone.kernels.attention_backends._choices", {})
    choose("flash", **shape)
    choose("xformers", **shape | {"queries": 3})
    told = json.loads(json.dumps(choices()))
    monkeypatch.setattr("duotone.kernels.attention_backends._choices", {})
    keep_choices(told, "another GPU, torch 2.0")
    assert choices() == []
    keep_choices([*told, told[0] | {"queries": 4, "backend": "withdrawn"}], measured_on())
    assert choices() == told[: 1 if xformers()[0] is None else 2]
    assert backend_of(False, 0, *shape.values()) == "flash", "and nothing is measured"


def test_xformers_is_not_taken_where_a_graph_is_compiled():
    measured = {"backend": "xformers", "milliseconds": {"xformers": 1.0, "flash": 3.0, "cudnn": 2.0}, "refused": {}}
    assert (
        backend_to_run(measured, compiling=False) == "xformers" and backend_to_run(measured, compiling=True) == "cudnn"
    )
    asked_for = {"backend": "xformers", "milliseconds": {}, "refused": {}}
    assert backend_to_run(asked_for, compiling=True) == "xformers", "who overrides, decides"


def test_xformers_that_cannot_run_is_named():
    module, reason = xformers()
    assert (module is None) == bool(reason)
