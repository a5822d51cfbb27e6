"""fuse(unet): our kernels inside any diffusers UNet2DModel or UNet2DConditionModel instance; state dict unchanged.

The instance's residual blocks, transformers, attentions and a few more parts change their class: nothing is wrapped,
copied or hooked, so the UNet can be moved, cast, compiled, copied and saved as before, and unfuse(unet) undoes it. A
part with a class, hook or forward that is not diffusers' own is left alone, or called as a module where otherwise only
its weights would be read.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.engine.model.blocks import image_of, packed, tokens_of
from duotone.kernels.attention import attention
from duotone.kernels.group_norm_silu import group_norm_silu

SUPPORTED = ("UNet2DModel", "UNet2DConditionModel")
PLAIN_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0", "XFormersAttnProcessor", "SlicedAttnProcessor")
"""The processors of diffusers that compute attention and nothing else; any other is left in place."""


@dataclass
class Fused:
    """What fuse() did: how many parts of each kind were replaced, and why each other part was left."""

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

    Returns, and prints unless `quiet`, what was replaced, what was left and why; a second call fuses parts added since.
    A mask keeps a token or discards it, as in diffusers: values between 0 and 1 are rounded. Only first-order gradients
    in reverse mode are supported. Raises Refused on anything but the two supported classes.
    """
    refuse_others(unet, "fuse()")
    before, fused = is_fused(unet), Fused()
    for name, module in unet.named_modules():
        fuse_module(name, module, fused)
    fuse_start(unet, fused)
    fuse_end(unet, fused)
    if before and not fused.replaced:
        fused.left = {type(unet).__name__: "it is fused already: nothing was done"} | fused.left
    return report(fused, quiet)


def unfuse(unet: nn.Module) -> None:
    """Gives every part its original class and processor back.

    Raises Refused, before anything is changed, if a fused part has since been given another forward or class, which
    would still call the fused one.
    """
    refuse_others(unet, "unfuse()")
    parts = {name: module for name, module in unet.named_modules() if isinstance(module, FusedPart)}
    for name, module in parts.items():
        if "forward" in vars(module) or "original" not in vars(type(module)):
            raise Refused(f"unfuse(): {name} has been given another forward or class since fuse(); undo that first")
    for module in parts.values():
        module.__class__ = type(module).original
        vars(module).pop("around", None)
    for module in unet.modules():
        if isinstance(getattr(module, "processor", None), FusedAttention):
            module.processor = module.processor.original


def refuse_others(unet: nn.Module, caller: str) -> None:
    if not any(parent.__name__ in SUPPORTED for parent in type(unet).__mro__):
        raise Refused(f"{caller} takes {' or '.join(SUPPORTED)} of diffusers, not {type(unet).__name__}")


def is_fused(unet: nn.Module) -> bool:
    return any(isinstance(module, FusedPart) for module in unet.modules())


def report(fused: Fused, quiet: bool) -> Fused:
    if not quiet:
        print(fused)
    return fused


# ------------------------------------------------------------------------------------------------ which parts


def fuse_module(name: str, module: nn.Module, fused: Fused) -> None:
    """Gives one part its fused class, or notes why it is left."""
    kind = next((parent.__name__ for parent in type(module).__mro__ if is_theirs(parent, PARTS)), None)
    if kind is None or isinstance(module, FusedPart) or isinstance(getattr(module, "processor", None), FusedAttention):
        return
    why_not, part, called = PARTS[kind]
    why = why_not_plain(module) or why_not(module)
    if why:
        fused.left[name] = why
        return
    fused.count(called)
    if part is FusedAttention:
        module.processor = FusedAttention(module.processor)
    else:
        module.__class__ = part.of(type(module))


def is_theirs(cls: type, names) -> bool:
    """Whether a class has one of these names and is diffusers' own, not another package's class of the same name."""
    return cls.__name__ in names and cls.__module__.startswith("diffusers.")


def why_not_plain(module: nn.Module) -> str | None:
    """Why a part may not do what the name of its class says, or None."""
    if not is_theirs(type(module), PARTS):
        return f"it is a {type(module).__name__} of {type(module).__module__}"
    return "it has a forward of its own" if "forward" in vars(module) else None


def fuse_start(unet: nn.Module, fused: Fused) -> None:
    """The first convolution; the weights keep their layout, so that saving and sharding work as before."""
    if isinstance(unet.conv_in, ChannelsLast):
        return
    if type(unet.conv_in) is not nn.Conv2d or "forward" in vars(unet.conv_in):
        fused.left["conv_in"] = "it is not a plain convolution: give images in channels_last"
        return
    unet.conv_in.__class__ = ChannelsLast.of(nn.Conv2d)


def fuse_end(unet: nn.Module, fused: Fused) -> None:
    """Fuses the last group norm with the SiLU that follows it."""
    if isinstance(unet.conv_norm_out, FusedGroupNormSiLU) and isinstance(unet.conv_act, Nothing):
        return
    if unet.conv_norm_out is None or not isinstance(unet.conv_act, nn.SiLU):
        fused.left["conv_norm_out"] = "no group norm and SiLU before the last convolution"
        return
    if not is_plain(unet.conv_norm_out, nn.GroupNorm) or not is_plain(unet.conv_act, nn.SiLU):
        fused.left["conv_norm_out"] = "it, or its SiLU, has a hook or a forward of its own"
        return
    unet.conv_norm_out.__class__ = FusedGroupNormSiLU.of(nn.GroupNorm)
    unet.conv_act.__class__ = Nothing.of(nn.SiLU)
    unet.conv_act.around = (unet,)  # in a tuple, so that the UNet does not become a submodule of the activation
    fused.count("group norms with SiLU")


def why_not_residual(block: nn.Module) -> str | None:
    if not isinstance(block.norm1, nn.GroupNorm) or not isinstance(block.norm2, nn.GroupNorm):
        return f"its norms are {type(block.norm1).__name__} and {type(block.norm2).__name__}"
    if not is_plain(block.nonlinearity, nn.SiLU):
        return f"its nonlinearity is {type(block.nonlinearity).__name__}, or has a hook or a forward of its own"
    if block.upsample is not None or block.downsample is not None:
        return "it also changes the resolution"
    if block.time_embedding_norm not in ("default", "scale_shift"):
        return f"its time embedding enters through {block.time_embedding_norm}"
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
    processor = type(getattr(block, "processor", None))
    if processor.__name__ not in PLAIN_PROCESSORS:
        return f"its processor is {processor.__name__}"
    if not is_theirs(processor, PLAIN_PROCESSORS):
        return f"its processor is the {processor.__name__} of {processor.__module__}"
    if getattr(block, "only_cross_attention", False) or getattr(block, "added_kv_proj_dim", None):
        return "its keys are projected in another way"
    return None


def why_not_transformer(block: nn.Module) -> str | None:
    if not getattr(block, "is_input_continuous", False) or not isinstance(block.norm, nn.GroupNorm):
        return "it does not begin with a group norm of an image"
    if not hasattr(block, "_operate_on_continuous_inputs") or not hasattr(block, "_get_output_for_continuous_inputs"):
        return "this version of diffusers has no separate beginning and end of a transformer"
    return None


def why_not_upsample(block: nn.Module) -> str | None:
    if block.norm is not None or block.use_conv_transpose or not block.interpolate:
        return "it does more than repeat pixels"
    return None


# ---------------------------------------------------------------------------------------------- the fused parts


class FusedPart:
    """The base of every fused class, which replaces another class, its `original`."""

    made: dict[tuple[type, type], type] = {}

    @classmethod
    def of(cls, original: type) -> type:
        """The subclass of `original` with this fused forward; made once."""
        key = (cls, original)
        if key not in cls.made:
            facts = {"__module__": __name__, "part": cls, "original": original}
            # The original's name, since tools find blocks by the name of their class.
            cls.made[key] = type(original.__name__, (cls, original), facts)
        return cls.made[key]

    def __reduce__(self):
        """Pickled as the two classes it is made of: another process could not find the combined class by name."""
        return blank, (self.part, self.original), self.__dict__


def blank(part: type, original: type) -> nn.Module:
    """An instance of a fused class, whose state is still to be loaded."""
    cls = part.of(original)
    return cls.__new__(cls)


class ChannelsLast(FusedPart):
    """The first convolution: its output is channels-last, and every later part keeps that layout."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return super().forward(x_NCHW.contiguous(memory_format=torch.channels_last))


class FusedGroupNormSiLU(FusedPart):
    """The last norm with the SiLU after it, or without it if the norm is watched."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return normed(self, x_NCHW, act=None if is_watched(self) else SILU)


class Nothing(FusedPart):
    """The SiLU after the last norm: does nothing if that norm is still fused and has applied it already."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.around[0].conv_norm_out
        return x if isinstance(norm, FusedGroupNormSiLU) and not is_watched(norm) else F.silu(x)


class FusedResnetBlock(FusedPart):
    """Norm, SiLU, convolution; norm of the sum with the time embedding (or FiLM by it), SiLU, convolution; residual."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        h, modulation = normed(self.norm1, input_tensor, act=self.nonlinearity), self.modulation(temb)
        if "add_NC" in modulation and is_plain(self.conv1, nn.Conv2d) and self.conv1.bias is not None:
            # The norm adds a vector anyway: with the bias in it, the convolution needs no separate pass to add it.
            h = self.conv1._conv_forward(h, self.conv1.weight, None)
            modulation["add_NC"] = modulation["add_NC"] + self.conv1.bias
        else:
            h = self.conv1(h)
        h = normed(self.norm2, h, act=self.nonlinearity, **modulation)
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


SILU = nn.SiLU()


def is_plain(layer: nn.Module, kind: type) -> bool:
    """Whether reading a layer's weights may replace calling it: no adapter around it, no hook, no replaced forward."""
    return type(layer) is kind and not is_watched(layer)


def is_watched(layer: nn.Module) -> bool:
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    return bool(hooks) or "forward" in vars(layer)


def normed(norm: nn.GroupNorm, x_NCHW: Tensor, *, act: nn.Module | None, **modulation: Tensor) -> Tensor:
    """The norm and what surrounds it as one operation, or as separate ones if a part must be called as a module."""
    readable = isinstance(norm, FusedPart) or is_plain(norm, nn.GroupNorm) and norm.affine
    if not readable or not (act is None or is_plain(act, nn.SiLU)):
        return normed_in_parts(norm, x_NCHW, act, **modulation)
    affine = (norm.weight, norm.bias, norm.num_groups, norm.eps)
    return group_norm_silu(x_NCHW, *affine, silu=act is not None, **modulation)


def normed_in_parts(norm: nn.Module, x_NCHW: Tensor, act, add_NC=None, scale_NC=None, shift_NC=None) -> Tensor:
    h_NCHW = norm(x_NCHW if add_NC is None else x_NCHW + add_NC[:, :, None, None])
    if scale_NC is not None:
        h_NCHW = h_NCHW * (1 + scale_NC[:, :, None, None]) + shift_NC[:, :, None, None]
    return h_NCHW if act is None else act(h_NCHW)


class FusedTransformer(FusedPart):
    """A transformer that keeps channels-last: diffusers' turns its output into planes, and later parts run on those."""

    def _operate_on_continuous_inputs(self, x_NCHW: Tensor) -> tuple[Tensor, int]:
        tokens_NLC = tokens_of(normed(self.norm, x_NCHW, act=None))
        h_NLC = self.projected(self.proj_in, tokens_NLC, x_NCHW.shape[2:])
        return h_NLC, h_NLC.shape[-1]

    def _get_output_for_continuous_inputs(
        self, hidden_states, residual, batch_size, height, width, inner_dim
    ) -> Tensor:
        return residual + image_of(self.projected(self.proj_out, hidden_states, (height, width)), (height, width))

    def projected(self, layer: nn.Module, tokens_NLC: Tensor, size: tuple[int, int]) -> Tensor:
        """A linear layer, or a 1 x 1 convolution: over channels-last pixels that is the same matrix product."""
        if is_plain(layer, nn.Conv2d):
            return F.linear(tokens_NLC, layer.weight.flatten(1), layer.bias)
        # A watched or adapter-wrapped convolution is called, and takes images.
        return layer(tokens_NLC) if self.use_linear_projection else tokens_of(layer(image_of(tokens_NLC, size)))


class FusedUpsample(FusedPart):
    """Repeats each pixel 2 x 2, then convolves, in the input's layout: diffusers' goes to planes from 64 images on."""

    def forward(self, x_NCHW: Tensor, output_size: tuple[int, int] | None = None, *args, **kwargs) -> Tensor:
        height, width = output_size or [2 * side for side in x_NCHW.shape[2:]]
        if x_NCHW.shape[0] * x_NCHW.shape[1] * height * width >= 2**31:
            x_NCHW = x_NCHW.contiguous()  # torch's channels-last kernel counts in 32 bits
        x_NCHW = F.interpolate(x_NCHW, size=(height, width), mode="nearest")
        if not self.use_conv:
            return x_NCHW
        return self.conv(x_NCHW) if self.name == "conv" else self.Conv2d_0(x_NCHW)


class FusedAttention:
    """diffusers' attention processor with our attention; masks other than (N, 1, M) go to the replaced processor."""

    def __init__(self, original=None):
        self.original = (
            original or usual_processor()
        )  # without one, when diffusers builds a new processor of the same class as adapters are added or removed

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
            out = image_of(out, residual.shape[2:])
        if attn.residual_connection:
            out = out + residual
        return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor

    @staticmethod
    def normed_pixels(attn, x_NCHW: Tensor) -> Tensor:
        """The image as tokens_NLC, after the block's own group norm if it has one."""
        return tokens_of(x_NCHW if attn.group_norm is None else normed(attn.group_norm, x_NCHW, act=None))

    @staticmethod
    def attended(attn, x_NLC: Tensor, context_NMD: Tensor | None, bias_N1M: Tensor | None) -> Tensor:
        if context_NMD is None:
            q, k, v = each_projected(attn.heads, x_NLC, attn.to_q, attn.to_k, attn.to_v)
        else:
            (q,) = each_projected(attn.heads, x_NLC, attn.to_q)
            k, v = each_projected(attn.heads, context_NMD, attn.to_k, attn.to_v)
        # diffusers' bias is 0 for a key that counts and -10000 for one that does not; if none does, all count.
        mask_NM = None if bias_N1M is None else bias_N1M[:, 0] > -5000
        mask_NM = None if mask_NM is None else mask_NM | ~mask_NM.any(dim=1, keepdim=True)
        return attention(q, k, v, mask_NM=mask_NM, scale=attn.scale).flatten(2)


def usual_processor():
    from diffusers.models.attention_processor import AttnProcessor2_0

    return AttnProcessor2_0()


def each_projected(heads: int, x_NLC: Tensor, *layers: nn.Module) -> tuple[Tensor, ...]:
    """Each (N, L, heads, width): one matrix product if all are plain linear layers, all with or all without a bias."""
    if all(is_plain(layer, nn.Linear) for layer in layers) and len({layer.bias is None for layer in layers}) == 1:
        return packed(heads, x_NLC, *layers)
    return tuple(layer(x_NLC).unflatten(-1, (heads, -1)) for layer in layers)


def takes_the_time_in_its_norms(block: nn.Module) -> str:
    return "its norms take the time embedding"


PARTS = {
    "ResnetBlock2D": (why_not_residual, FusedResnetBlock, "residual blocks"),
    "ResnetBlockCondNorm2D": (takes_the_time_in_its_norms, FusedPart, "residual blocks"),
    "Transformer2DModel": (why_not_transformer, FusedTransformer, "transformers"),
    "Attention": (why_not_attention, FusedAttention, "attentions"),
    "Upsample2D": (why_not_upsample, FusedUpsample, "upsamplings"),
}
"""By diffusers' class name: why an instance would be left, what replaces it, what a count of them is called."""
