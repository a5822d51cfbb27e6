"""fuse(unet): our kernels inside any diffusers UNet2DModel or UNet2DConditionModel instance; state dict unchanged.

An instance's norms, residual blocks and attention processors are given classes of their own: nothing is wrapped or copied,
so the UNet can be moved, cast, compiled, copied and saved as before, and unfuse(unet) undoes it.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.kernels.attention import attention
from duotone.kernels.group_norm_silu import group_norm_silu

SUPPORTED = ("UNet2DModel", "UNet2DConditionModel")


@dataclass
class Fused:
    """What fuse() did: counts by kind, and what was left with the reason."""

    replaced: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def count(self, kind: str) -> None:
        self.replaced[kind] = self.replaced.get(kind, 0) + 1

    def __str__(self) -> str:
        done = ", ".join(f"{n} {kind}" for kind, n in self.replaced.items()) or "nothing"
        lines = [f"fused: {done}"] + [f"left: {name} ({why})" for name, why in self.left.items()]
        return "\n".join(lines)


def fuse(unet: nn.Module, *, quiet: bool = False) -> Fused:
    """Puts fused group norms with their SiLU, attention and channels-last activations into a diffusers UNet, in place.

    Says what was replaced, what was left and why; raises Refused on anything but the two supported classes.
    """
    kind = type(unet).__name__
    if kind not in SUPPORTED:
        raise Refused(f"fuse() takes {' or '.join(SUPPORTED)} of diffusers, not {kind}")
    if is_fused(unet):
        return report(Fused(left={kind: "it is fused already: nothing was done"}), quiet)
    fused = Fused()
    for name, module in unet.named_modules():
        fuse_module(name, module, fused)
    fuse_end(unet, fused)
    unet.register_forward_pre_hook(channels_last_sample, with_kwargs=True)
    return report(fused, quiet)


def unfuse(unet: nn.Module) -> None:
    """Gives every part its own class and processor back."""
    for module in unet.modules():
        if isinstance(module, FusedPart):
            module.__class__ = type(module).original
        if isinstance(getattr(module, "processor", None), FusedAttention):
            module.processor = module.processor.original
    for key, hook in list(unet._forward_pre_hooks.items()):
        if hook is channels_last_sample:
            del unet._forward_pre_hooks[key]
            unet._forward_pre_hooks_with_kwargs.pop(key, None)


def is_fused(unet: nn.Module) -> bool:
    return any(isinstance(module, FusedPart) for module in unet.modules())


def report(fused: Fused, quiet: bool) -> Fused:
    if not quiet:
        print(fused)
    return fused


# ------------------------------------------------------------------------------------------------ which parts


def fuse_module(name: str, module: nn.Module, fused: Fused) -> None:
    kind = type(module).__name__
    if kind == "ResnetBlock2D":
        why = why_not_residual(module)
        if why:
            fused.left[name] = why
        else:
            module.__class__ = FusedResnetBlock.of(type(module))
            fused.count("residual blocks")
    elif kind == "Transformer2DModel" and isinstance(module.norm, nn.GroupNorm):
        module.norm.__class__ = FusedGroupNorm.of(type(module.norm))
        fused.count("group norms")
    elif kind == "Attention":
        why = why_not_attention(module)
        if why:
            fused.left[name] = why
        else:
            module.processor = FusedAttention(module.processor)
            fused.count("attentions")


def fuse_end(unet: nn.Module, fused: Fused) -> None:
    """The last group norm takes the SiLU that follows it."""
    if unet.conv_norm_out is None or not isinstance(unet.conv_act, nn.SiLU):
        fused.left["conv_norm_out"] = "no group norm and SiLU before the last convolution"
        return
    unet.conv_norm_out.__class__ = FusedGroupNormSiLU.of(type(unet.conv_norm_out))
    unet.conv_act.__class__ = Nothing.of(type(unet.conv_act))
    fused.count("group norms with SiLU")


def why_not_residual(block: nn.Module) -> str | None:
    if not isinstance(block.norm1, nn.GroupNorm) or not isinstance(block.norm2, nn.GroupNorm):
        return f"its norms are {type(block.norm1).__name__} and {type(block.norm2).__name__}"
    if not isinstance(block.nonlinearity, nn.SiLU):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}"
    if block.upsample is not None or block.downsample is not None:
        return "it also changes the resolution"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time embedding enters by {block.time_embedding_norm}"
    if block.skip_time_act:
        return "its time embedding has no SiLU"
    return None


def why_not_attention(block: nn.Module) -> str | None:
    extras = [
        n
        for n in ("norm_q", "norm_k", "norm_cross", "spatial_norm", "add_k_proj")
        if getattr(block, n, None) is not None
    ]
    if extras:
        return f"it has {', '.join(extras)}"
    if getattr(block, "only_cross_attention", False) or getattr(block, "added_kv_proj_dim", None):
        return "its keys are projected in another way"
    return None


# ---------------------------------------------------------------------------------------------- the fused parts


class FusedPart:
    """Marks a class that stands in for another, its `original`."""

    made: dict[tuple[type, type], type] = {}

    @classmethod
    def of(cls, original: type) -> type:
        """The subclass of `original` with this fused forward; made once."""
        key = (cls, original)
        if key not in cls.made:
            cls.made[key] = type(cls.__name__, (cls, original), {"__module__": __name__, "original": original})
        return cls.made[key]


class FusedGroupNorm(FusedPart):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return group_norm_silu(x_NCHW, self.weight, self.bias, self.num_groups, self.eps, silu=False)


class FusedGroupNormSiLU(FusedPart):
    def forward(self, x_NCHW: Tensor) -> Tensor:
        return group_norm_silu(x_NCHW, self.weight, self.bias, self.num_groups, self.eps)


class Nothing(FusedPart):
    """The SiLU that the norm before it has already done."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class FusedResnetBlock(FusedPart):
    """Norm, SiLU, convolution; norm of the sum with the time embedding (or FiLM by it), SiLU, convolution; residual."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        h = self.conv1(normed(self.norm1, input_tensor))
        h = normed(self.norm2, h, **self.modulation(temb))
        h = self.conv2(self.dropout(h))
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        h = input_tensor + h
        return h if self.output_scale_factor == 1 else h / self.output_scale_factor

    def modulation(self, temb: Tensor | None) -> dict[str, Tensor]:
        if self.time_emb_proj is None or temb is None:
            return {}
        projected = self.time_emb_proj(self.nonlinearity(temb))
        if self.time_embedding_norm == "default":
            return {"add_NC": projected}
        scale_NC, shift_NC = projected.chunk(2, dim=1)
        return {"scale_NC": scale_NC, "shift_NC": shift_NC}


def normed(norm: nn.GroupNorm, x_NCHW: Tensor, **modulation: Tensor) -> Tensor:
    return group_norm_silu(x_NCHW, norm.weight, norm.bias, norm.num_groups, norm.eps, **modulation)


class FusedAttention:
    """diffusers' attention processor with our attention; additive masks of other shapes go to the processor it replaced."""

    def __init__(self, original):
        self.original = original

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None, *args, **kwargs
    ):
        if attention_mask is not None and (attention_mask.ndim != 3 or attention_mask.shape[1] != 1):
            return self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        residual, pixels = hidden_states, hidden_states.ndim == 4
        if pixels:
            hidden_states = self.normed_pixels(attn, hidden_states)
        elif attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        out = self.attended(attn, hidden_states, encoder_hidden_states, attention_mask)
        out = attn.to_out[1](attn.to_out[0](out))
        if pixels:
            out = out.unflatten(1, residual.shape[2:]).permute(0, 3, 1, 2)
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    @staticmethod
    def normed_pixels(attn, x_NCHW: Tensor) -> Tensor:
        """tokens_NLC after the block's own group norm: a view of a channels-last image."""
        norm = attn.group_norm
        if norm is not None:
            x_NCHW = group_norm_silu(x_NCHW, norm.weight, norm.bias, norm.num_groups, norm.eps, silu=False)
        return x_NCHW.permute(0, 2, 3, 1).flatten(1, 2)

    @staticmethod
    def attended(attn, x_NLC: Tensor, context_NMD: Tensor | None, bias_N1M: Tensor | None) -> Tensor:
        context_NMD = x_NLC if context_NMD is None else context_NMD
        q, k, v = (
            layer(x).unflatten(-1, (attn.heads, -1))
            for layer, x in ((attn.to_q, x_NLC), (attn.to_k, context_NMD), (attn.to_v, context_NMD))
        )
        # Their bias is 0 where a key counts and -10000 where it does not.
        mask_NM = None if bias_N1M is None else bias_N1M[:, 0] > -5000
        return attention(q, k, v, mask_NM=mask_NM, scale=attn.scale).flatten(2)


def channels_last_sample(unet: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Channels-last activations begin with the sample; the weights keep their layout, so that saving works."""
    if args:
        args = (args[0].contiguous(memory_format=torch.channels_last), *args[1:])
    else:
        kwargs["sample"] = kwargs["sample"].contiguous(memory_format=torch.channels_last)
    return args, kwargs
