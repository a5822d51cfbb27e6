"""Translates latent diffusion's original UNet layout, which Stable Diffusion's single files use, into our names.

That layout numbers the blocks on the way down, downsamples included, and those on the way up; the modules of a block have their
position in it as a second number.
"""

from collections.abc import Iterator

from torch import Tensor

from duotone.engine.model.unet import UNetConfig

PREFIX = "model.diffusion_model."
"""Prefix of the UNet's names in such a file, which also holds an image codec and a text encoder."""

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
    """The UNet's weights in such a file, under diffusers' names; weights that the layout does not have keep their own name."""
    places = {**ENDS, **dict(blocks(config))}
    inside = {name.removeprefix(PREFIX): value for name, value in named.items() if name.startswith(PREFIX)}
    return {renamed(name, places): value for name, value in inside.items()}


def renamed(name: str, places: dict[str, str]) -> str:
    """The name with its longest known prefix replaced."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        beginning = ".".join(parts[:end])
        if beginning in places:
            return ".".join([places[beginning], *parts[end:]])
    return name


def blocks(config: UNetConfig) -> Iterator[tuple[str, str]]:
    """(their name, our name) of every module between the first and the last layers."""
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
        # The upsample belongs to the level's last block, after its attention if there is one.
        place = 1 if kind == "none" else 2
        yield f"output_blocks.{number - 1}.{place}.conv", f"up_blocks.{level}.upsamplers.0.conv"


def residual_block(theirs: str, ours: str) -> Iterator[tuple[str, str]]:
    for part, name in IN_A_RESIDUAL_BLOCK.items():
        yield f"{theirs}.{part}", f"{ours}.{name}"
