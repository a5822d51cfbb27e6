"""attention against its definition in fp64: values, every gradient, masks, head widths, strides."""

import pytest
import torch
import torch.nn.functional as F

from duotone.kernels import dispatch
from duotone.kernels.attention import (
    CASES,
    NAME,
    attention,
    attention_reference,
    choices,
    choose,
    fits,
    taken,
    tiling,
    xformers,
)

CHECKED = [case for case in CASES if not case.timed]
BY_NAME = {case.name: case for case in CASES}
# Weights are rounded to the images' type between the two products, as in every fused kernel.
# A GPU computes fp32 in PyTorch's kernels; the interpreter shows this kernel's own arithmetic in it.
ARITHMETIC = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 3e-2}


def draw(case, device, dtype):
    """Query, key, value, mask; the last image attends to nothing where the case is masked."""
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
    exact = differentiate(attention_reference, tokens, mask_NM, dout_NLHD, torch.float64, **options)
    for name, mine, truth in zip(("out", "dq", "dk", "dv"), got, exact):
        # Over a single key the weight is 1 and dq, dk are 0: judge them beside dv.
        scale = (
            truth.abs().amax() if name in ("out", "dv") else torch.maximum(truth.abs().amax(), exact[3].abs().amax())
        )
        agree(mine, truth, name, arithmetic or ARITHMETIC[mine.dtype], scale=scale)
    return got


@pytest.mark.parametrize("dtype", ARITHMETIC, ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, dtype, device, agree, launching):
    tokens, mask_NM = draw(case, device, dtype)
    out, dq, dk, dv = compare(tokens, mask_NM, torch.randn_like(tokens[0]), agree, launching)
    if case.masked:
        for nothing in (out[-1], dq[-1], dk[-1], dv[-1]):
            assert not nothing.any(), "a row that attends to nothing gives 0 and takes no gradient"


def test_packed_projection_is_read_in_place(device, agree, launching):
    """Query, key and value as slices of one projection, queries as a view of a contiguous feature map."""
    packed_NLHD = torch.randn(2, 49, 2, 3 * 16, device=device)
    tokens = list(packed_NLHD.chunk(3, dim=-1))
    tokens[0] = torch.randn(2, 32, 7, 7, device=device).flatten(2).transpose(1, 2).unflatten(-1, (2, 16))
    compare(tokens, None, torch.randn(2, 49, 2, 16, device=device), agree, launching)


@pytest.mark.parametrize("gradient", ["one_number", "transposed"])
def test_gradients_of_any_stride(gradient, device, agree, launching):
    tokens, mask_NM = draw(BY_NAME["padded_words"], device, torch.float32)
    dout_NLHD = torch.randn((), device=device).expand(tokens[0].shape)
    if gradient == "transposed":
        dout_NLHD = torch.randn_like(tokens[0].transpose(1, 3)).contiguous().transpose(1, 3)
    compare(tokens, mask_NM, dout_NLHD, agree, launching)


def test_scale_and_large_scores(device, agree, launching):
    """Scores of hundreds: the row's maximum is taken away before the exponential."""
    tokens, mask_NM = draw(BY_NAME["padded_words"], device, torch.float32)
    tokens[0] = tokens[0] * 30
    compare(tokens, mask_NM, torch.randn_like(tokens[0]), agree, launching, arithmetic=3e-5, scale=0.5)


def test_queries_are_split_only_where_heads_are_few():
    assert tiling(1, 300, 20, 1, 16, backward=True).shares > 1
    assert tiling(64, 1024, 77, 4, 64, backward=True).shares == 1


def test_large_tiles_go_elsewhere_on_chips_with_little_shared_memory():
    """The ledger's figures: 128 keys of 128 channels take 120 KiB where an RTX has 99 and an H100 227."""
    rtx, a100, h100 = 101_376, 166_912, 232_448
    assert not fits(77, 96, rtx) and fits(77, 64, rtx) and fits(64, 128, rtx)
    assert fits(77, 96, a100) and fits(128, 128, h100)


def test_many_keys_go_to_pytorch(device):
    tokens = [torch.randn(1, n, 2, 16, device=device) for n in (32, 200, 200)]
    before = dispatch.launches[NAME]
    out_NLHD = attention(*tokens)
    assert dispatch.launches[NAME] == before
    torch.testing.assert_close(out_NLHD, attention_reference(*tokens), rtol=1e-4, atol=1e-4)


def test_unmasked_equals_pytorch(device, launching):
    tokens, _ = draw(BY_NAME["words"], device, torch.float32)
    with launching(NAME):
        out_NLHD = attention(*tokens)
    theirs_NHLD = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tokens))
    torch.testing.assert_close(out_NLHD, theirs_NHLD.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"q_NLHD": torch.ones(2, 4, 8)}, "q_NLHD"),
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


def test_a_choice_can_be_fixed_and_read():
    shape = {"images": 1, "queries": 2, "keys": 3, "heads": 4, "width": 5, "dtype": torch.bfloat16, "masked": False}
    choose("flash", **shape)
    assert shape | {"backend": "flash", "milliseconds": {}, "refused": {}} in choices()
    with pytest.raises(ValueError, match="^backend must be one of default, flash"):
        choose("fastest", **shape)


def test_xformers_is_not_taken_where_a_graph_is_compiled():
    measured = {"backend": "xformers", "milliseconds": {"xformers": 1.0, "flash": 3.0, "cudnn": 2.0}, "refused": {}}
    assert taken(measured, compiling=False) == "xformers" and taken(measured, compiling=True) == "cudnn"
    asked_for = {"backend": "xformers", "milliseconds": {}, "refused": {}}
    assert taken(asked_for, compiling=True) == "xformers", "who overrides, decides"


def test_xformers_that_cannot_run_is_named():
    module, reason = xformers()
    assert (module is None) == bool(reason)
    if torch.cuda.is_available():
        assert module is not None, reason
