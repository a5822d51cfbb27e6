"""out = softmax(scale * q k^T) v: q, k, v are read once and out is written once, in the layout the projections leave.

N images, L query tokens, M key and value tokens, H heads, D channels per head. Channels-last feature maps are tokens as
a free view, so nothing is transposed or copied around the call. Vaswani et al. 2017, equation 1.
"""

import torch
import torch.nn.functional as F

from duotone.kernels.dispatch import require, require_same_device

# ---------------------------------------------------------------------------------------------------- definition


def attention_reference(q_NLHD, k_NMHD, v_NMHD, *, mask_NM=None, scale=None):
    """The definition in plain PyTorch; mask is boolean, True attends, and a row that attends to nothing gives 0."""
    scale = q_NLHD.shape[-1] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q_NLHD.dtype, torch.float32)
    score_NHLM = torch.einsum("nlhd,nmhd->nhlm", q_NLHD.to(wide), k_NMHD.to(wide)) * scale
    if mask_NM is not None:
        score_NHLM = score_NHLM.masked_fill(~mask_NM[:, None, None, :], torch.finfo(wide).min)
    weight_NHLM = score_NHLM.softmax(dim=-1)
    if mask_NM is not None:
        weight_NHLM = weight_NHLM * mask_NM[:, None, None, :]
    return torch.einsum("nhlm,nmhd->nlhd", weight_NHLM, v_NMHD.to(wide)).to(q_NLHD.dtype)


# ------------------------------------------------------------------------------------------ PyTorch's own kernels


def _scaled_dot_product(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale):
    q_NHLD, k_NHMD, v_NHMD = (t.transpose(1, 2) for t in (q_NLHD, k_NMHD, v_NMHD))
    if mask_NM is None:
        return F.scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, scale=scale).transpose(1, 2)
    # A row with nothing to attend to is NaN, or a uniform mean, elsewhere: let it attend, then erase it.
    attends_N = mask_NM.any(dim=1)
    mask_N11M = (mask_NM | ~attends_N[:, None])[:, None, None, :]
    out_NHLD = F.scaled_dot_product_attention(q_NHLD, k_NHMD, v_NHMD, attn_mask=mask_N11M, scale=scale)
    return out_NHLD.transpose(1, 2) * attends_N[:, None, None, None].to(out_NHLD.dtype)


# -------------------------------------------------------------------------------------------------------- public


def attention(q_NLHD, k_NMHD, v_NMHD, *, mask_NM=None, scale=None):
    """Attend from every query token to the keys that the mask admits; scale defaults to D ** -0.5.

    Raises ValueError on shapes, types or devices that do not fit.
    """
    _validate(q_NLHD, k_NMHD, v_NMHD, mask_NM)
    return _scaled_dot_product(q_NLHD, k_NMHD, v_NMHD, mask_NM, scale)


def _validate(q_NLHD, k_NMHD, v_NMHD, mask_NM):
    require(q_NLHD.dim() == 4, "q_NLHD", "4-dimensional", tuple(q_NLHD.shape))
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
