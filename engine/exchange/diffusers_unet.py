"""Converts between our UNet's configuration and that of diffusers' UNet2DConditionModel and UNet2DModel ("theirs").

What their classes cannot hold raises Inexpressible with the reason; a feature of theirs that we lack raises Refused by name.
"""

from duotone.data.refusal import Refused
from duotone.engine.model.unet import UNetConfig

CONDITIONED, PLAIN = "UNet2DConditionModel", "UNet2DModel"
DOWN = {"none": "DownBlock2D", "self": "AttnDownBlock2D", "cross": "CrossAttnDownBlock2D"}
UP = {"none": "UpBlock2D", "self": "AttnUpBlock2D", "cross": "CrossAttnUpBlock2D"}


class Inexpressible(Refused):
    """A network that diffusers' classes cannot hold."""

    def __init__(self, reason: str):
        super().__init__(f"diffusers cannot hold this network: {reason}; export --format safetensors instead")
        self.reason = reason


# ------------------------------------------------------------------------------------------------ ours to theirs


def to_config(config: UNetConfig, size: int, classes: int | None = None) -> dict:
    """Their config.json for our UNet, with `classes` class embeddings (including the null class)."""
    if config.film_shared:
        raise Inexpressible("model.film_shared, one FiLM projection for all blocks")
    shared = {
        "_class_name": CONDITIONED if config.reads_tokens else PLAIN,
        "sample_size": size,
        "in_channels": config.in_channels + config.extra_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.channels),
        "down_block_types": [DOWN[kind] for kind in config.attention],
        "up_block_types": [UP[kind] for kind in reversed(config.attention)],
        "norm_num_groups": config.groups,
        "norm_eps": config.eps,
        "dropout": config.dropout,
        "downsample_padding": 0 if config.down_pads_ends else 1,
        "resnet_time_scale_shift": "scale_shift" if config.film else "default",
        "flip_sin_to_cos": config.time_flip,
        "freq_shift": config.time_shift,
        "time_embedding_dim": config.time_width,
        "num_class_embeds": classes,
    }
    return shared | (conditioned_part(config) if config.reads_tokens else plain_part(config))


def conditioned_part(config: UNetConfig) -> dict:
    middles = {"cross": "UNetMidBlock2DCrossAttn", "single": "UNetMidBlock2D", "absent": None}
    if config.middle not in middles:
        raise Inexpressible(f"model.middle = {config.middle} beside cross-attention")
    head_numbers = their_head_numbers(config)
    if not mirrored(config.attention, head_numbers):
        raise Inexpressible(
            "on the way up their self-attention takes its head width from the opposite level of the list"
        )
    if middle_has_other_heads(config.attention, config.middle, head_numbers, config.channels):
        raise Inexpressible("their middle block has as many heads as a head of the last level's self-attention is wide")
    return {
        "mid_block_type": middles[config.middle],
        "layers_per_block": list(config.blocks),
        "attention_head_dim": head_numbers,
        "transformer_layers_per_block": list(config.depth),
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
    }


def their_head_numbers(config: UNetConfig) -> list[int]:
    """Their attention_head_dim, one number per level: the count of heads for cross-attention, a head's width for self-attention.

    A level without attention needs a number too. It is free, so it takes what self-attention at the opposite level of the list
    needs (see `mirrored`).
    """
    kinds = config.attention
    numbers = [w // heads if kind == "self" else heads for w, heads, kind in zip(config.channels, config.heads, kinds)]
    free = [kind == "none" for kind in kinds]
    free[-1] = free[-1] and config.middle != "cross"
    opposite = list(zip(kinds, numbers))[::-1]
    return [n if not f or kind != "self" else other for n, f, (kind, other) in zip(numbers, free, opposite)]


def plain_part(config: UNetConfig) -> dict:
    if config.middle == "single":
        raise Inexpressible("model.middle = single without cross-attention")
    if config.middle == "self" and not config.middle_norm and not config.film:
        raise Inexpressible("model.middle_norm off without model.film")
    if len(set(config.blocks)) > 1:
        raise Inexpressible(f"model.blocks = {config.blocks} differ by level without cross-attention")
    levels = [i for i, kind in enumerate(config.attention) if kind == "self"] + [-1] * (config.middle == "self")
    head_widths = {config.channels[i] // config.heads[i] for i in levels}
    if len(head_widths) > 1:
        raise Inexpressible(f"heads of several widths, {sorted(head_widths)}, without cross-attention")
    return {
        "mid_block_type": None if config.middle == "absent" else "UNetMidBlock2D",
        "layers_per_block": config.blocks[0],
        "attention_head_dim": head_widths.pop() if head_widths else 8,
        "add_attention": config.middle == "self",
        # If this is None, their scale_shift models have no norm before the middle's attention.
        "attn_norm_num_groups": config.groups if config.film and config.middle_norm else None,
    }


# ------------------------------------------------------------------------------------------------ theirs to ours

NEUTRAL = {
    "center_input_sample": (False,),
    "only_cross_attention": (False,),
    "downsample_padding": (0, 1),
    "downsample_type": ("conv",),
    "upsample_type": ("conv",),
    "mid_block_scale_factor": (1, 1.0),
    "act_fn": ("silu", "swish"),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "num_attention_heads": (None,),
    "dual_cross_attention": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "class_embed_type": (None, "projection"),  # a pooled caption's projection belongs to the text condition
    "addition_embed_type": (None,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1, 1.0),
    "time_embedding_type": ("positional",),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "time_cond_proj_dim": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "mid_block_only_cross_attention": (None, False),
    "cross_attention_norm": (None,),
    "resnet_time_scale_shift": ("default", "scale_shift"),
}
PLAIN_ONLY = {"class_embed_type": (*NEUTRAL["class_embed_type"], "timestep")}  # the sinusoid of the label's number
REQUIRED = ("block_out_channels", "down_block_types", "up_block_types")
READ = (
    *REQUIRED,
    *("mid_block_type", "add_attention", "layers_per_block", "transformer_layers_per_block", "attention_head_dim"),
    *("in_channels", "out_channels", "cross_attention_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps"),
    *("projection_class_embeddings_input_dim",),
    *("dropout", "use_linear_projection", "time_embedding_dim", "flip_sin_to_cos", "freq_shift", "num_class_embeds"),
)
WITHOUT_EFFECT = (
    *("sample_size", "upcast_attention"),
    # These have an effect only together with another feature, which is refused above.
    *("num_train_timesteps", "addition_time_embed_dim", "addition_embed_type_num_heads"),
)


def refuse_unsupported(theirs: dict, kind: str) -> None:
    """Raises Refused on a feature that we do not have, and on a field that this file does not know, naming it."""
    for name, supported in (NEUTRAL | (PLAIN_ONLY if kind == PLAIN else {})).items():
        if name in theirs and not is_one_of(theirs[name], supported):
            raise Refused(
                f"{kind} with {name} = {theirs[name]!r} is not supported (only {', '.join(map(repr, supported))})"
            )
    for name in REQUIRED:
        if name not in theirs:
            raise Refused(
                f"{kind} without {name} in its config.json: save it again with diffusers, which writes them all"
            )
    known = {*NEUTRAL, *READ, *WITHOUT_EFFECT}
    for name in sorted(theirs.keys() - known):
        if not name.startswith("_") and theirs[name]:
            raise Refused(f"{kind} with {name} = {theirs[name]!r} is not supported: the field is unknown here")
    groups = theirs.get("norm_num_groups", 32)
    if groups is None:
        raise Refused(f"{kind} with norm_num_groups = None is not supported: every norm here is a group norm")
    if theirs.get("attn_norm_num_groups") not in (None, groups):
        raise Refused(f"{kind} with attn_norm_num_groups other than norm_num_groups = {groups} is not supported")
    widths = theirs.get("cross_attention_dim", 1280)
    if isinstance(widths, list | tuple) and len(set(widths)) > 1:
        raise Refused(
            f"{kind} with cross_attention_dim = {widths} is not supported: tokens have one width for all levels"
        )


def is_one_of(value, supported: tuple) -> bool:
    """Whether a field's value, or its value at every level, is among the supported ones."""
    return all(level in supported for level in value) if isinstance(value, list | tuple) else value in supported


def from_config(theirs: dict) -> UNetConfig:
    """Our configuration of their UNet; a feature that we do not have is refused by name, never ignored."""
    kind = theirs.get("_class_name")
    if kind not in (CONDITIONED, PLAIN):
        raise Refused(f"{kind} is not supported: only {CONDITIONED} and {PLAIN} are")
    refuse_unsupported(theirs, kind)
    channels = tuple(theirs["block_out_channels"])
    levels = len(channels)
    attention = tuple(level_kind(name, DOWN) for name in theirs["down_block_types"])
    if tuple(level_kind(name, UP) for name in reversed(theirs["up_block_types"])) != attention:
        raise Refused(f"{kind} whose up_block_types do not mirror its down_block_types is not supported")
    film = theirs.get("resnet_time_scale_shift", "default") == "scale_shift"
    return UNetConfig(
        channels=channels,
        attention=attention,
        middle=middle_kind(theirs),
        heads=head_counts(theirs, channels, attention),
        blocks=per_level(theirs.get("layers_per_block", 2), levels),
        depth=per_level(theirs.get("transformer_layers_per_block", 1), levels),
        in_channels=theirs.get("in_channels", 4 if kind == CONDITIONED else 3),
        out_channels=theirs.get("out_channels", 4 if kind == CONDITIONED else 3),
        context_width=per_level(theirs.get("cross_attention_dim", 1280), levels)[0],
        groups=theirs.get("norm_num_groups", 32),
        eps=theirs.get("norm_eps", 1e-5),
        film=film,
        dropout=theirs.get("dropout", 0.0),
        down_pads_ends=theirs.get("downsample_padding", 1) == 0,
        linear_projection=theirs.get("use_linear_projection", False),
        middle_norm=kind == CONDITIONED or not film or theirs.get("attn_norm_num_groups") is not None,
        time_width=theirs.get("time_embedding_dim"),
        time_flip=theirs.get("flip_sin_to_cos", True),
        time_shift=theirs.get("freq_shift", 0),
    )


def level_kind(name: str, table: dict[str, str]) -> str:
    for kind, theirs in table.items():
        if name == theirs:
            return kind
    raise Refused(f"block type {name} is not supported: only {', '.join(table.values())} are")


def middle_kind(theirs: dict) -> str:
    name = theirs.get(
        "mid_block_type", "UNetMidBlock2DCrossAttn" if theirs["_class_name"] == CONDITIONED else "UNetMidBlock2D"
    )
    if name is None:
        return "absent"
    if theirs["_class_name"] == CONDITIONED:
        kinds = {"UNetMidBlock2DCrossAttn": "cross", "UNetMidBlock2D": "single"}
        if name not in kinds:
            raise Refused(f"mid_block_type {name} is not supported: only {', '.join(kinds)} are")
        return kinds[name]
    return "self" if theirs.get("add_attention", True) else "none"


def head_counts(theirs: dict, channels: tuple, attention: tuple) -> tuple[int, ...]:
    given = theirs.get("attention_head_dim", 8)
    if theirs["_class_name"] == PLAIN:
        reads = [kind == "self" for kind in attention[:-1]] + ["self" in (attention[-1], middle_kind(theirs))]
        for width in (width for width, attends in zip(channels, reads) if attends and given):
            if width % given:
                raise Refused(
                    f"{PLAIN} with attention_head_dim = {given}, which does not divide {width}, is not supported"
                )
        return tuple(1 if given is None else max(1, width // given) for width in channels)
    numbers = per_level(given, len(channels))
    if not mirrored(attention, list(numbers)):
        raise Refused(
            f"{CONDITIONED} whose self-attention has other heads in its up blocks than in its down blocks is not supported"
        )
    if middle_has_other_heads(attention, middle_kind(theirs), numbers, channels):
        raise Refused(
            f"{CONDITIONED} whose middle has other heads than its last level's self-attention is not supported"
        )
    return tuple(w // n if kind == "self" else n for w, n, kind in zip(channels, numbers, attention))


def per_level(value, levels: int) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels


# ------------------------------------------------------------------------------------------------------ both ways


def mirrored(attention: tuple, head_numbers: list) -> bool:
    """Whether every self-attention level has the same number as the opposite level, whose number their up blocks use."""
    pairs = zip(attention, head_numbers, reversed(head_numbers))
    return all(number == opposite for kind, number, opposite in pairs if kind == "self")


def middle_has_other_heads(attention: tuple, middle: str, head_numbers: list, channels: tuple) -> bool:
    """Whether the last level's number, a head's width for its self-attention, is another count of heads in the middle."""
    reads = attention[-1] == "self" and middle == "cross"
    return reads and channels[-1] // head_numbers[-1] != head_numbers[-1]
