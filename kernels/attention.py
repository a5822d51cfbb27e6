"""out = softmax(scale * q k^T) v: the scores stay on chip, and q, k, v and out keep the layout of the projections.

N images, L query tokens, M key and value tokens, H heads, D channels per head. Viewing a channels-last feature map
as tokens is free, so nothing is transposed or copied around the call. Vaswani et al. 2017, equation 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from duotone.kernels import attention_backends as backends
from duotone.kernels.dispatch import (
    INTERPRETED,
    constant_in_graphs,
    count_fallback,
    exceeds_32_bit_offsets,
    launch,
    require,
    require_same_device,
    runs_kernel,
    tl,
    triton,
    triton_op,
    wrap_triton,
)

NAME = "attention"

# ---------------------------------------------------------------------------------------------------- definition


def attention_reference(q_NLHD, k_NMHD, v_NMHD, *, mask_NM=None, scale=None):
    """The definition in plain PyTorch; mask is boolean, True = attend, and a row that attends to nothing gives 0."""
    scale = q_NLHD.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q_NLHD.dtype, torch.float32)
    score_NHLM = torch.einsum("nlhd,nmhd->nhlm", q_NLHD.to(wide), k_NMHD.to(wide)) * scale
    if mask_NM is not None:
        score_NHLM = score_NHLM.masked_fill(~mask_NM[:, None, None, :], torch.finfo(wide).min)
    weight_NHLM = score_NHLM.softmax(dim=-1)
    if mask_NM is not None:
        weight_NHLM = weight_NHLM * mask_NM[:, None, None, :]
    return torch.einsum("nhlm,nmhd->nlhd", weight_NHLM, v_NMHD.to(wide)).to(q_NLHD.dtype)


# --------------------------------------------------------------------------------------------------------- cases


@dataclass(frozen=True)
class Case:
    """One shape worth testing and timing, and why."""

    name: str
    images: int
    queries: int
    keys: int
    heads: int
    width: int
    why: str
    masked: bool = False
    timed: bool = False


CASES = [
    Case("words", 2, 64, 77, 2, 32, "CLIP's 77 tokens: not a multiple of any block"),
    Case(
        "padded_words", 3, 70, 77, 2, 64, "padding mask, ragged queries, one row that attends to nothing", masked=True
    ),
    Case("one_key", 2, 16, 1, 2, 8, "a class token alone: softmax over one value; the narrowest head", masked=True),
    Case("odd_map", 2, 49, 49, 3, 40, "7x7 self-attention, 40 channels per head"),
    Case("ninety_six", 1, 64, 64, 2, 96, "96 channels per head: not a power of two"),
    Case("widest", 1, 40, 128, 1, 128, "the largest tile: 128 keys, 128 channels"),
    Case("few_programs", 1, 300, 20, 1, 16, "one image and head: queries are split over programs, sums are merged"),
    Case("level_32_words", 64, 1024, 77, 4, 64, "the network's cross-attention", masked=True, timed=True),
    Case("level_16_words", 64, 256, 77, 4, 96, "the network's cross-attention", masked=True, timed=True),
    Case("level_8_words", 64, 64, 77, 4, 96, "the network's cross-attention", masked=True, timed=True),
    Case("level_8_self", 64, 64, 64, 4, 96, "the network's smallest self-attention", timed=True),
    Case("narrow_words", 64, 1024, 77, 4, 32, "32 channels per head", timed=True),
    Case("wide_words", 64, 256, 77, 4, 128, "128 channels per head", timed=True),
    Case("words_1024_128", 64, 1024, 77, 4, 128, "77 keys over {1024, 256, 64} queries of {32, 64, 128}", timed=True),
    Case("words_256_32", 64, 256, 77, 4, 32, "77 keys, as above", timed=True),
    Case("words_256_64", 64, 256, 77, 4, 64, "77 keys, as above", timed=True),
    Case("words_64_32", 64, 64, 77, 4, 32, "77 keys, as above", timed=True),
    Case("words_64_64", 64, 64, 77, 4, 64, "77 keys, as above", timed=True),
    Case("words_64_128", 64, 64, 77, 4, 128, "77 keys, as above", timed=True),
    Case("level_96_self", 8, 9216, 9216, 4, 64, "the longest: a map of 96 x 96", timed=True),
    Case("level_64_self", 64, 4096, 4096, 4, 32, "self-attention that PyTorch's kernels serve", timed=True),
    Case("level_32_self", 64, 1024, 1024, 4, 64, "self-attention that PyTorch's kernels serve", timed=True),
    Case("level_16_self", 64, 256, 256, 4, 96, "self-attention that PyTorch's kernels serve", timed=True),
]

# --------------------------------------------------------------------------------------------------- device code
# All keys of a head fit in one tile, so a row's softmax is complete in one step and nothing is rescaled. Only q, k and
# v are saved: the backward pass recomputes the weights and computes sum(dout * out) as sum(weights * dweights).
# L queries of a tile, M keys, D channels; rows are padded to tiles. Signatures are grouped by subject.
# fmt: off

# The interpreter would multiply the bit patterns of bf16 operands; fp32 copies give the same exact products.
_WIDEN = tl.constexpr(INTERPRETED)


@triton.jit
def _tile(row_R, channel_D, stride_row, stride_d):
    return row_R[:, None] * stride_row + channel_D[None, :] * stride_d


@triton.jit
def _product(a, b):
    """Matrix product accumulated in fp32."""
    if _WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b)


@triton.jit
def _weights(
    q_LD, k_MD, mask, image, key_M, real_M, keys, scale, MASKED: tl.constexpr,
):
    """Softmax over the admitted keys; a row without any is 0."""
    scale = tl.cast(scale, tl.float32)  # torch.compile passes Python numbers as fp64, which would promote the rest
    score_LM = _product(q_LD, tl.trans(k_MD)) * scale
    admitted_M = real_M
    if MASKED:
        admitted_M = real_M & (tl.load(mask + image * keys + key_M, mask=real_M, other=0) != 0)
    score_LM = tl.where(admitted_M[None, :], score_LM, float("-inf"))
    highest_L = tl.max(score_LM, axis=1)
    highest_L = tl.where(highest_L == float("-inf"), 0.0, highest_L)
    weight_LM = tl.exp(score_LM - highest_L[:, None])
    total_L = tl.sum(weight_LM, axis=1)
    return weight_LM / tl.where(total_L == 0.0, 1.0, total_L)[:, None]


@triton.jit
def _forward_kernel(
    q, k, v, mask, out,
    queries, keys, width, scale,
    q_n, q_l, q_h, q_d, k_n, k_m, k_h, k_d, v_n, v_m, v_h, v_d, out_n, out_l, out_h,
    MASKED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    query_L = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    key_M = tl.arange(0, BLOCK_M)
    channel_D = tl.arange(0, BLOCK_D)
    real_D = channel_D < width
    real_LD = (query_L < queries)[:, None] & real_D[None, :]
    real_MD = (key_M < keys)[:, None] & real_D[None, :]
    q_LD = tl.load(q + image * q_n + head * q_h + _tile(query_L, channel_D, q_l, q_d), mask=real_LD, other=0.0)
    k_MD = tl.load(k + image * k_n + head * k_h + _tile(key_M, channel_D, k_m, k_d), mask=real_MD, other=0.0)
    v_MD = tl.load(v + image * v_n + head * v_h + _tile(key_M, channel_D, v_m, v_d), mask=real_MD, other=0.0)
    weight_LM = _weights(q_LD, k_MD, mask, image, key_M, key_M < keys, keys, scale, MASKED)
    out_LD = _product(weight_LM.to(v_MD.dtype), v_MD)
    to_LD = out + image * out_n + head * out_h + _tile(query_L, channel_D, out_l, 1)
    tl.store(to_LD, out_LD.to(out.dtype.element_ty), mask=real_LD)


@triton.jit
def _backward_kernel(
    q, k, v, mask, dout, dq, dk, dv,
    queries, keys, width, scale, share,
    q_n, q_l, q_h, q_d, k_n, k_m, k_h, k_d, v_n, v_m, v_h, v_d, dout_n, dout_l, dout_h, dout_d,
    dq_n, dq_l, dq_h, dk_n, dk_s, dk_m, dk_h,
    MASKED: tl.constexpr,
    BLOCK_L: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """One program owns a head's keys and a share of its queries: dk and dv stay on chip, dq is written once."""
    scale = tl.cast(scale, tl.float32)  # torch.compile passes Python numbers as fp64, which would promote the rest
    image = tl.program_id(2).to(tl.int64)
    head = tl.program_id(1)
    key_M = tl.arange(0, BLOCK_M)
    channel_D = tl.arange(0, BLOCK_D)
    real_D = channel_D < width
    real_MD = (key_M < keys)[:, None] & real_D[None, :]
    k_MD = tl.load(k + image * k_n + head * k_h + _tile(key_M, channel_D, k_m, k_d), mask=real_MD, other=0.0)
    v_MD = tl.load(v + image * v_n + head * v_h + _tile(key_M, channel_D, v_m, v_d), mask=real_MD, other=0.0)
    dk_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    dv_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    last = tl.minimum(tl.program_id(0) * share + share, queries)
    for first in range(tl.program_id(0) * share, last, BLOCK_L):
        query_L = first + tl.arange(0, BLOCK_L)
        real_LD = (query_L < last)[:, None] & real_D[None, :]
        q_LD = tl.load(q + image * q_n + head * q_h + _tile(query_L, channel_D, q_l, q_d), mask=real_LD, other=0.0)
        from_LD = dout + image * dout_n + head * dout_h + _tile(query_L, channel_D, dout_l, dout_d)
        dout_LD = tl.load(from_LD, mask=real_LD, other=0.0)
        weight_LM = _weights(q_LD, k_MD, mask, image, key_M, key_M < keys, keys, scale, MASKED)
        dv_MD += _product(tl.trans(weight_LM.to(dout_LD.dtype)), dout_LD)
        dweight_LM = _product(dout_LD, tl.trans(v_MD))
        flow_LM = weight_LM * dweight_LM
        dscore_LM = ((flow_LM - weight_LM * tl.sum(flow_LM, axis=1)[:, None]) * scale).to(q_LD.dtype)
        dk_MD += _product(tl.trans(dscore_LM), q_LD)
        dq_LD = _product(dscore_LM, k_MD)
        to_LD = dq + image * dq_n + head * dq_h + _tile(query_L, channel_D, dq_l, 1)
        tl.store(to_LD, dq_LD.to(dq.dtype.element_ty), mask=real_LD)
    to_MD = image * dk_n + tl.program_id(0) * dk_s + head * dk_h + _tile(key_M, channel_D, dk_m, 1)
    tl.store(dk + to_MD, dk_MD.to(dk.dtype.element_ty), mask=real_MD)
    tl.store(dv + to_MD, dv_MD.to(dv.dtype.element_ty), mask=real_MD)


# fmt: on

# ----------------------------------------------------------------------------------------------------- operators

MOST_KEYS = 128
MOST_WIDTH = 128
_ENOUGH_PROGRAMS = 128


@dataclass(frozen=True)
class Tiling:
    """How one call is cut into programs."""

    block_l: int
    block_m: int
    block_d: int
    share: int  # queries of one program
    shares: int
    warps: int


def tiling(images: int, queries: int, keys: int, heads: int, width: int, *, backward: bool) -> Tiling:
    """Cut a call into programs by its shape alone, so that the same call always sums in the same order."""
    block_m, block_d = _block(keys), _block(width)
    if not backward:
        return Tiling(64, block_m, block_d, 64, -(-queries // 64), 4)
    # dk and dv stay in registers: larger ones need more warps and fewer queries at a time, or they spill.
    block_l = 64 if block_m * block_d <= 4096 else 32
    warps = 4 if block_m * block_d <= 2048 else 8
    shares = min(-(-_ENOUGH_PROGRAMS // (images * heads)), -(-queries // (2 * block_l)))
    share = -(-queries // (shares * block_l)) * block_l
    return Tiling(block_l, block_m, block_d, share, -(-queries // share), warps)


def _block(length):
    """The next power of two, at least the 16 that a tensor core takes."""
    return max(16, 1 << (length - 1).bit_length())


def _strides(name, tensor, axes):
    return {f"{name}_{axis}": stride for axis, stride in zip(axes, tensor.stride())}


def _shared(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale, cut):
    _, queries, _, width = q_NLHD.shape
    tensors = {"q": q_NLHD, "k": k_NMHD, "v": v_NMHD, "mask": q_NLHD if mask_NM is None else mask_NM.contiguous()}
    strides = _strides("q", q_NLHD, "nlhd") | _strides("k", k_NMHD, "nmhd") | _strides("v", v_NMHD, "nmhd")
    sizes = {"queries": queries, "keys": k_NMHD.shape[1], "width": width, "scale": scale}
    blocks = {"BLOCK_L": cut.block_l, "BLOCK_M": cut.block_m, "BLOCK_D": cut.block_d}
    return tensors | strides | sizes | blocks | {"MASKED": mask_NM is not None, "num_warps": cut.warps, "num_stages": 1}


def _cut(q_NLHD, k_NMHD, backward):
    images, queries, heads, width = q_NLHD.shape
    return tiling(images, queries, k_NMHD.shape[1], heads, width, backward=backward)


@triton_op("duotone::attention", mutates_args={})
def _forward(q_NLHD: Tensor, k_NMHD: Tensor, v_NMHD: Tensor, mask_NM: Tensor | None, scale: float) -> Tensor:
    images, _, heads, _ = q_NLHD.shape
    cut = _cut(q_NLHD, k_NMHD, backward=False)
    out_NLHD = torch.empty(q_NLHD.shape, dtype=q_NLHD.dtype, device=q_NLHD.device)
    arguments = _shared(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale, cut) | {"out": out_NLHD}
    launch(
        NAME, wrap_triton(_forward_kernel), (cut.shares, heads, images), arguments | _strides("out", out_NLHD, "nlh")
    )
    return out_NLHD


@triton_op("duotone::attention_backward", mutates_args={})
def _backward(
    dout_NLHD: Tensor, q_NLHD: Tensor, k_NMHD: Tensor, v_NMHD: Tensor, mask_NM: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    images, _, heads, width = q_NLHD.shape
    keys = k_NMHD.shape[1]
    cut = _cut(q_NLHD, k_NMHD, backward=True)
    dq_NLHD = torch.empty(q_NLHD.shape, dtype=q_NLHD.dtype, device=q_NLHD.device)
    kept = k_NMHD.dtype if cut.shares == 1 else torch.float32
    dk_SNMHD, dv_SNMHD = (
        torch.empty(cut.shares, images, keys, heads, width, dtype=kept, device=q_NLHD.device) for _ in range(2)
    )
    arguments = _shared(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale, cut) | {"dout": dout_NLHD, "share": cut.share}
    arguments |= {"dq": dq_NLHD, "dk": dk_SNMHD, "dv": dv_SNMHD} | _strides("dout", dout_NLHD, "nlhd")
    arguments |= _strides("dq", dq_NLHD, "nlh") | _strides("dk", dk_SNMHD, "snmh")
    launch(NAME, wrap_triton(_backward_kernel), (cut.shares, heads, images), arguments)
    if cut.shares == 1:
        return dq_NLHD, dk_SNMHD.view(k_NMHD.shape), dv_SNMHD.view(k_NMHD.shape)
    return dq_NLHD, dk_SNMHD.sum(dim=0).to(k_NMHD.dtype), dv_SNMHD.sum(dim=0).to(v_NMHD.dtype)


def _save(ctx, inputs, output):
    q_NLHD, k_NMHD, v_NMHD, mask_NM, ctx.scale = inputs
    ctx.save_for_backward(q_NLHD, k_NMHD, v_NMHD, mask_NM)


def _differentiate(ctx, dout_NLHD):
    if exceeds_32_bit_offsets(dout_NLHD):
        dout_NLHD = dout_NLHD.contiguous()
    return *_backward(dout_NLHD, *ctx.saved_tensors, ctx.scale), None, None


_forward.register_autograd(_differentiate, setup_context=_save)

# -------------------------------------------------------------------------------------------------------- public


def attention(q_NLHD, k_NMHD, v_NMHD, *, mask_NM=None, scale=None):
    """Attend from every query token to the keys that the mask admits; scale defaults to D ** -0.5.

    This kernel takes up to 128 keys; more go to whichever of PyTorch's and xformers' kernels was measured fastest for
    the shape. Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(q_NLHD, k_NMHD, v_NMHD, mask_NM)
    keys, width = k_NMHD.shape[1], q_NLHD.shape[3]
    if keys <= MOST_KEYS and runs_kernel(NAME, q_NLHD):
        reason = _unsupported(q_NLHD, k_NMHD, v_NMHD)
        if reason is None:
            return _forward(q_NLHD, k_NMHD, v_NMHD, mask_NM, width**-0.5 if scale is None else float(scale))
        count_fallback(NAME, reason, *q_NLHD.shape, keys)
    if q_NLHD.is_meta:
        return backends.attention_on_meta(q_NLHD, k_NMHD, v_NMHD)
    if not q_NLHD.is_cuda:
        return backends.on_a_cpu(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale)
    return backends.by_measurement(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale)


def fits(keys: int, width: int, shared_bytes: int) -> bool:
    """Whether a program's tiles of keys, values and their gradients fit in a chip's shared memory.

    Turing's 64 KB are too few: even the smallest tiles that text needs take 88 KB when compiled for it.
    """
    return shared_bytes >= 160_000 or (shared_bytes >= 99_000 and _block(keys) * _block(width) <= 8192)


@constant_in_graphs
def _shared_bytes(device_index):
    return torch.cuda.get_device_properties(device_index).shared_memory_per_block_optin


def _unsupported(q_NLHD, k_NMHD, v_NMHD):
    """The reason why a call with few keys goes to PyTorch's kernels, or None."""
    images, _, heads, width = q_NLHD.shape
    keys = k_NMHD.shape[1]
    # Exact fp32 products cannot use tensor cores, and without those a tile of keys does not fit in registers.
    if q_NLHD.dtype not in (torch.bfloat16, torch.float16, *([torch.float32] if INTERPRETED else [])):
        return f"{q_NLHD.dtype} queries"
    if q_NLHD.numel() == 0:
        return "no queries"
    if width > MOST_WIDTH:
        return f"more than {MOST_WIDTH} channels per head"
    if q_NLHD.is_cuda and not fits(keys, width, _shared_bytes(q_NLHD.device.index)):
        return "keys and channels that do not fit in this chip's shared memory"
    if any(exceeds_32_bit_offsets(tensor) for tensor in (q_NLHD, k_NMHD, v_NMHD)):
        return "tokens of an image that are farther apart than a program can address"
    return "more images or heads than a grid can address" if max(images, heads) > 65535 else None


def _validate(q_NLHD, k_NMHD, v_NMHD, mask_NM):
    require(q_NLHD.dim() == 4, "q_NLHD", "4-dimensional", tuple(q_NLHD.shape))
    require(q_NLHD.is_floating_point(), "q_NLHD", "a floating-point tensor", q_NLHD.dtype)
    require(k_NMHD.dim() == 4, "k_NMHD", "4-dimensional", tuple(k_NMHD.shape))
    images, _, heads, width = q_NLHD.shape
    keys = k_NMHD.shape[1]
    fit = (images, keys, heads, width)
    require(keys > 0, "k_NMHD", "at least one key", keys)
    require(tuple(k_NMHD.shape) == fit, "k_NMHD", f"of shape {fit}", tuple(k_NMHD.shape))
    require(tuple(v_NMHD.shape) == fit, "v_NMHD", f"of shape {fit}", tuple(v_NMHD.shape))
    for name, value in {"k_NMHD": k_NMHD, "v_NMHD": v_NMHD}.items():
        require(value.dtype == q_NLHD.dtype, name, f"{q_NLHD.dtype} like q_NLHD", value.dtype)
        require_same_device(name, value, q_NLHD)
    if mask_NM is not None:
        require(mask_NM.dtype == torch.bool, "mask_NM", "boolean, True = attend", mask_NM.dtype)
        require(tuple(mask_NM.shape) == (images, keys), "mask_NM", f"({images}, {keys})", tuple(mask_NM.shape))
        require_same_device("mask_NM", mask_NM, q_NLHD)
