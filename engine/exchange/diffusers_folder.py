"""diffusers' folder format: our UNet as UNet2DConditionModel or UNet2DModel and back, with scheduler configuration.

What their classes cannot hold is refused with the reason; a feature of theirs that we do not have is named.
"""

import json
import os
import shutil
import uuid
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from duotone.data.refusal import Refused
from duotone.data.whole_file import as_opened
from duotone.engine.artifact import Model
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe

CONDITIONED, PLAIN = "UNet2DConditionModel", "UNet2DModel"
WEIGHTS = "diffusion_pytorch_model.safetensors"
DOWN = {"none": "DownBlock2D", "self": "AttnDownBlock2D", "cross": "CrossAttnDownBlock2D"}
UP = {"none": "UpBlock2D", "self": "AttnUpBlock2D", "cross": "CrossAttnUpBlock2D"}
LABEL, POOL = "conditioners.label.embedding.", "conditioners.text.pool."
TABLE = f"{LABEL}weight"


class Inexpressible(Refused):
    """A network that diffusers' classes cannot hold."""

    def __init__(self, reason: str):
        super().__init__(f"diffusers cannot hold this network: {reason}; export --format safetensors instead")
        self.reason = reason


# ------------------------------------------------------------------------------------------------ ours to theirs


def to_config(config: UNetConfig, size: int, classes: int | None = None) -> dict:
    """Their config.json for our UNet, with `classes` class embeddings (the null class included)."""
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


def config_of(recipe: Recipe, classes: int) -> dict:
    """Their config.json for a recipe's network and what its conditions add to it; raises Inexpressible with the reason."""
    kinds = {condition.kind: condition for condition in recipe.conditioning}
    others = sorted(kinds.keys() - {"label", "text"})
    if others:
        raise Inexpressible(f"the condition {', '.join(others)}")
    config = to_config(recipe.model, recipe.data.size, classes + 1 if "label" in kinds else None)
    if getattr(kinds.get("label"), "port", "vector") == "tokens":
        raise Inexpressible("a label as a token")
    # For diffusers a caption that also reaches the time embedding is a projected class embedding.
    if not getattr(kinds.get("text"), "pooled", False):
        return config
    if "label" in kinds:
        raise Inexpressible("a label and a pooled caption, both added to the time embedding")
    return config | {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": recipe.model.context_width,
    }


def why_not(recipe: Recipe) -> str | None:
    """Why diffusers cannot hold what a recipe trains, or None where it can."""
    try:
        config_of(recipe, classes=1)
        scheduler_config(recipe.objective)
    except Inexpressible as refusal:
        return refusal.reason
    return None


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
        raise Inexpressible("their middle counts as many heads as a head of the last level's self-attention is wide")
    return {
        "mid_block_type": middles[config.middle],
        "layers_per_block": list(config.blocks),
        "attention_head_dim": head_numbers,
        "transformer_layers_per_block": list(config.depth),
        "cross_attention_dim": config.context_width,
        "use_linear_projection": config.linear_projection,
    }


def their_head_numbers(config: UNetConfig) -> list[int]:
    """attention_head_dim, one a level: it counts heads where there is cross-attention and is a head's width elsewhere.

    A level without attention has a number too, free to be what self-attention at the opposite end of the list asks for.
    """
    kinds = config.attention
    numbers = [w // heads if kind == "self" else heads for w, heads, kind in zip(config.channels, config.heads, kinds)]
    free = [kind == "none" for kind in kinds]
    free[-1] = free[-1] and config.middle != "cross"
    opposite = list(zip(kinds, numbers))[::-1]
    return [n if not f or kind != "self" else other for n, f, (kind, other) in zip(numbers, free, opposite)]


def mirrored(attention: tuple, head_numbers: list) -> bool:
    """Whether every self-attention level finds its own number at the opposite end of their list too."""
    pairs = zip(attention, head_numbers, reversed(head_numbers))
    return all(number == opposite for kind, number, opposite in pairs if kind == "self")


def middle_has_other_heads(attention: tuple, middle: str, head_numbers: list, channels: tuple) -> bool:
    """Whether the last level's number means something else in the middle: a head's width there, their count here."""
    reads = attention[-1] == "self" and middle == "cross"
    return reads and channels[-1] // head_numbers[-1] != head_numbers[-1]


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
        # Without this, their scale_shift models have no norm before the middle's attention.
        "attn_norm_num_groups": config.groups if config.film and config.middle_norm else None,
    }


def unet_weights(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under their names from a network's: the UNet's own, and the label embedding as class_embedding."""
    weights = {name.removeprefix("unet."): v for name, v in named.items() if name.startswith("unet.")}
    if TABLE in named:
        weights["class_embedding.weight"] = named[TABLE]
    for name, value in named.items():
        if name.startswith(POOL):
            weights[f"class_embedding.{name.removeprefix(POOL)}"] = value
    return {name: value.float().contiguous().cpu() for name, value in weights.items()}


def scheduler_config(objective) -> dict:
    """Their scheduler for an objective."""
    if isinstance(objective, EDM):
        return {
            "_class_name": "EDMEulerScheduler",
            "sigma_min": objective.sigma_min,
            "sigma_max": objective.sigma_max,
            "sigma_data": objective.sigma_data,
            "rho": objective.rho,
        }
    if isinstance(objective, DDPM):
        ends = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}[objective.schedule]
        return {
            "_class_name": "DDPMScheduler",
            "num_train_timesteps": objective.steps,
            "beta_schedule": {"cosine": "squaredcos_cap_v2"}.get(objective.schedule, objective.schedule),
            "beta_start": ends[0],
            "beta_end": ends[1],
            "prediction_type": {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}[objective.prediction],
            "clip_sample": objective.clips,
            "rescale_betas_zero_snr": objective.rescale_zero_snr,
            "timestep_spacing": "trailing",  # as sample() does; theirs begins below the last timestep otherwise
        }
    if isinstance(objective, Flow):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": objective.shift}
    raise Inexpressible(f"no scheduler of theirs samples the objective {type(objective).__name__}")


def export(model: Model, out: Path) -> list[str]:
    """Writes the folder whole or not at all; returns a line for each thing that diffusers will not know of the model."""
    if os.path.lexists(out):
        raise Refused(f"{out} exists: give another --out, nothing was written")
    from duotone.engine.model_card import card_of_folder  # which asks this file what diffusers can hold

    conditioners = model.network.conditioners
    config = config_of(model.recipe, len(model.facts.classes or ()))
    scheduler = scheduler_config(model.objective)
    draft = out.with_name(f".{out.name}-{uuid.uuid4().hex[:8]}")
    try:
        weights = unet_weights(model.network.state_dict())
        if "label" in conditioners:
            weights["class_embedding.weight"] = conditioners["label"].rows().float().contiguous().cpu()
        write_folder(draft, config, weights, scheduler)
        notes = write_index(draft, config, scheduler, list(conditioners)) + save_text_encoder(draft, model)
        told = card_of_folder(model.recipe, model.facts, model.images, config, scheduler, notes)
        (draft / "README.md").write_text(told)
        out.parent.mkdir(parents=True, exist_ok=True)
        os.replace(draft, out)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return notes


def write_folder(folder: Path, config: dict, weights: dict[str, Tensor], scheduler: dict) -> None:
    for name in ("unet", "scheduler"):
        (folder / name).mkdir(parents=True)
    (folder / "unet" / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, folder / "unet" / WEIGHTS, {"format": "pt"})
    as_opened(folder / "unet" / WEIGHTS)
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler, indent=2) + "\n")


def write_index(folder: Path, config: dict, scheduler: dict, conditions: list[str]) -> list[str]:
    """What makes the folder a pipeline, where they have one that samples it; DDPMPipeline scales no input, as EDM's needs."""
    if conditions or scheduler["_class_name"] != "DDPMScheduler":
        return ["no pipeline of theirs samples this: load the unet and the scheduler, and step through them"]
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return []


def save_text_encoder(folder: Path, model: Model) -> list[str]:
    """A text encoder that was trained with the network goes along, in transformers' own format."""
    if "text" not in model.network.conditioners:
        return []
    text = model.network.conditioners["text"]
    if text.frozen:
        return ["text: the frozen encoder is not copied; load it by its own name"]
    text.encoder.save_pretrained(folder / "text_encoder")
    pooled = ["text: pass the mean of a caption's tokens as class_labels"] if text.pool is not None else []
    return pooled + [
        "text: the encoder reads bytes (mark 1, byte + 3 each, mark 2, padded with 0): no tokenizer of theirs does that"
    ]


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
    "class_embed_type": (None, "projection"),  # of a pooled caption: the text condition's, not the UNet's
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
PLAIN_ONLY = {"class_embed_type": (*NEUTRAL["class_embed_type"], "timestep")}  # the label's, as its number's sinusoid
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
    # These speak only where another feature, refused above, is on.
    *("num_train_timesteps", "addition_time_embed_dim", "addition_embed_type_num_heads"),
)


def refuse_unsupported(theirs: dict, kind: str) -> None:
    """A feature that we do not have is named, and so is a field that this file has never heard of."""
    for name, supported in (NEUTRAL | (PLAIN_ONLY if kind == PLAIN else {})).items():
        if name in theirs and not is_one_of(theirs[name], supported):
            raise Refused(
                f"{kind} with {name} = {theirs[name]!r} is not supported (only {', '.join(map(repr, supported))})"
            )
    for name in REQUIRED:
        if name not in theirs:
            raise Refused(f"{kind} without {name} in its config.json: save it again with diffusers, which writes all")
    known = {*NEUTRAL, *READ, *WITHOUT_EFFECT}
    for name in sorted(theirs.keys() - known):
        if not name.startswith("_") and theirs[name]:
            raise Refused(f"{kind} with {name} = {theirs[name]!r} is not supported: nothing here knows that field")
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
    """Whether a field, or every level of one that is given by level, is as here."""
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
            f"{CONDITIONED} whose self-attention has other heads on the way up than on the way down is not supported"
        )
    if middle_has_other_heads(attention, middle_kind(theirs), numbers, channels):
        raise Refused(
            f"{CONDITIONED} whose middle has other heads than its last level's self-attention is not supported"
        )
    return tuple(w // n if kind == "self" else n for w, n, kind in zip(channels, numbers, attention))


def per_level(value, levels: int) -> tuple:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * levels
