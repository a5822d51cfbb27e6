"""The original layout of latent diffusion's UNets, in which Stable Diffusion's single files come, under our names.

There every block, downsample included, has one running number on the way down and one on the way up; the modules within a
number are told apart by their place.
"""

from collections.abc import Iterator

from torch import Tensor

from duotone.engine.model.unet import UNetConfig

PREFIX = "model.diffusion_model."
"""Of the UNet's names in such a file, beside an image codec's and a text encoder's."""

ENDS = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb": "class_embedding",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
IN_A_RESIDUAL_BLOCK = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}


def in_original_layout(named: dict[str, Tensor]) -> bool:
    return any(name.startswith(PREFIX) for name in named)


def by_diffusers_names(named: dict[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The UNet's weights of such a file, where the layout knows them under diffusers' names, else under their own."""
    places = {**ENDS, **dict(blocks(config))}
    inside = {name.removeprefix(PREFIX): value for name, value in named.items() if name.startswith(PREFIX)}
    return {renamed(name, places): value for name, value in inside.items()}


def renamed(name: str, places: dict[str, str]) -> str:
    """The name with its longest known beginning exchanged."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        beginning = ".".join(parts[:end])
        if beginning in places:
            return ".".join([places[beginning], *parts[end:]])
    return name


def blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(theirs, ours) of every module between the ends."""
    yield from way_down(config)
    if config.middle != "absent":
        yield from residual_block("middle_block.0", "mid_block.resnets.0")
        last = 1 if config.middle == "none" else 2
        yield "middle_block.1", "mid_block.attentions.0"
        yield from residual_block(f"middle_block.{last}", "mid_block.resnets.1")
    yield from way_up(config)


def way_down(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 1
    for level, count in enumerate(config.blocks):
        for i in range(count):
            yield from residual_block(f"input_blocks.{number}.0", f"down_blocks.{level}.resnets.{i}")
            yield f"input_blocks.{number}.1", f"down_blocks.{level}.attentions.{i}"
            number += 1
        yield f"input_blocks.{number}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        number += 1


def way_up(config: UNetConfig) -> Iterator[tuple[str, str]]:
    number = 0
    for level, (count, kind) in enumerate(zip(reversed(config.blocks), reversed(config.attention))):
        for i in range(count + 1):
            yield from residual_block(f"output_blocks.{number}.0", f"up_blocks.{level}.resnets.{i}")
            if kind != "none":
                yield f"output_blocks.{number}.1", f"up_blocks.{level}.attentions.{i}"
            number += 1
        # The upsample stands in the level's last number, behind what attention there is.
        place = 1 if kind == "none" else 2
        yield f"output_blocks.{number - 1}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def residual_block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for part, name in IN_A_RESIDUAL_BLOCK.items():
        yield f"{theirs}.{part}", f"{ours}.{name}"
