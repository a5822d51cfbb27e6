"""The networks that benches run: diffusers' class with our configuration, Stable Diffusion 1.5's shape, or a user's folder."""

import json
import logging
from pathlib import Path

import torch

from duotone.data.refusal import Refused
from duotone.engine.exchange import diffusers_unet
from duotone.engine.model.unet import UNetConfig

REFERENCE = UNetConfig()
SMALL = UNetConfig(
    channels=(64, 128, 128),
    attention=("none", "cross", "cross"),
    heads=(4, 4, 4),
    blocks=(2, 2, 2),
    depth=(1, 1, 1),
    context_width=128,
)
TINY = UNetConfig(
    channels=(16, 32),
    attention=("none", "cross"),
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    context_width=16,
    groups=8,
)
NAMED = {"reference": REFERENCE, "small": SMALL, "tiny": TINY}
SIZES = {"reference": 128, "small": 64, "tiny": 16, "sd15": 64}
# What Stable Diffusion 1.5's config.json changes of the class's defaults: 859.5 M parameters.
SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}


def diffusers():
    """The library, without the lines that it and xformers print on import."""
    logging.getLogger("xformers").setLevel(logging.CRITICAL)
    try:
        import diffusers as library
    except ImportError:
        raise Refused("diffusers is not installed, but this bench compares with it: pip install diffusers") from None
    library.utils.logging.set_verbosity(logging.CRITICAL)
    return library


def their_unet(wanted: str, size: int):
    """A diffusers UNet, freshly initialised or from a folder; raises Refused if the folder holds none."""
    if wanted == "sd15":
        return diffusers().UNet2DConditionModel(**SD15)
    if wanted not in NAMED:
        return from_folder(Path(wanted))
    theirs = diffusers_unet.to_config(NAMED[wanted], size)
    return getattr(diffusers(), theirs.pop("_class_name"))(**theirs)


def from_folder(path: Path):
    try:
        kind = json.loads((path / "config.json").read_text())["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} is not a diffusers UNet folder ({one_line(error)}): it needs a config.json") from None
    if kind not in (diffusers_unet.CONDITIONED, diffusers_unet.PLAIN):
        raise Refused(f"{path} holds a {kind}: --unet takes UNet2DModel or UNet2DConditionModel")
    library = diffusers()
    try:
        unet = getattr(library, kind).from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001 - a broken folder fails in as many ways as there are files
        raise Refused(f"{path} cannot be loaded ({one_line(error)}): save the UNet again") from None
    refuse_unfed(path, unet.config)
    return unet


def refuse_unfed(path: Path, config) -> None:
    """Raises Refused if the UNet takes inputs that the benches do not generate."""
    for name in ("addition_embed_type", "encoder_hid_dim_type", "class_embed_type"):
        if getattr(config, name, None) is not None:
            raise Refused(
                f"{path} has {name} = {getattr(config, name)!r}: the benches generate no such input; give a UNet without it"
            )


def one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def size_of(config, asked: int | None, otherwise: int) -> int:
    size = config.sample_size if isinstance(config.sample_size, int) else otherwise
    return size if asked is None else asked


def batches(config, size: int, count: int, batch: int, device: str):
    """Noisy images, times, targets and conditions, the same for every contender, from one seed."""
    g = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield {
            "x": torch.randn(batch, config.in_channels, size, size, generator=g).to(device),
            "t": torch.randint(1000, (batch,), generator=g).to(device),
            "target": torch.randn(batch, config.out_channels, size, size, generator=g).to(device),
            "condition": {name: value.to(device) for name, value in condition(config, batch, g).items()},
        }


def condition(config, batch: int, g: torch.Generator) -> dict:
    """77 tokens, as CLIP gives them, or class labels, or neither."""
    found = {}
    if getattr(config, "cross_attention_dim", None):
        found["encoder_hidden_states"] = torch.randn(batch, 77, config.cross_attention_dim, generator=g)
    if getattr(config, "num_class_embeds", None):
        found["class_labels"] = torch.randint(config.num_class_embeds, (batch,), generator=g)
    return found
