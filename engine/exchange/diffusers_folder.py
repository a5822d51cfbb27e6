"""A folder that diffusers loads: the network's weights under diffusers' names, its configuration, its objective's scheduler."""

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
from duotone.engine.exchange.diffusers_config import config_of, scheduler_config
from duotone.engine.model_card import card_of_folder

WEIGHTS = "diffusion_pytorch_model.safetensors"
LABEL, POOL = "conditioners.label.embedding.", "conditioners.text.pool."
TABLE = f"{LABEL}weight"


def unet_weights(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """A network's weights under diffusers' names, fp32 on the CPU; the label's or the pooled caption's are class_embedding."""
    weights = {name.removeprefix("unet."): v for name, v in named.items() if name.startswith("unet.")}
    if TABLE in named:
        weights["class_embedding.weight"] = named[TABLE]
    for name, value in named.items():
        if name.startswith(POOL):
            weights[f"class_embedding.{name.removeprefix(POOL)}"] = value
    return {name: value.float().contiguous().cpu() for name, value in weights.items()}


def export(model: Model, out: Path) -> list[str]:
    """Writes the folder completely or not at all; returns a line for each part of the model that diffusers cannot use as it is."""
    if os.path.lexists(out):
        raise Refused(f"{out} exists: give another --out, nothing was written")
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
    """Writes the index that makes the folder a pipeline, if diffusers has one: DDPMPipeline, for DDPM without conditions.

    DDPMPipeline does not scale the network's input, which EDM needs.
    """
    if conditions or scheduler["_class_name"] != "DDPMScheduler":
        return ["diffusers has no pipeline for this model: load the unet and the scheduler, and step through them"]
    index = {
        "_class_name": "DDPMPipeline",
        "unet": ["diffusers", config["_class_name"]],
        "scheduler": ["diffusers", scheduler["_class_name"]],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return []


def save_text_encoder(folder: Path, model: Model) -> list[str]:
    """Saves a text encoder that was trained with the network, in transformers' format; returns notes for the user."""
    if "text" not in model.network.conditioners:
        return []
    text = model.network.conditioners["text"]
    if text.frozen:
        return ["text: the frozen encoder is not copied; load it by its own name"]
    text.encoder.save_pretrained(folder / "text_encoder")
    pooled = ["text: pass the mean of a caption's tokens as class_labels"] if text.pool is not None else []
    return pooled + [
        "text: the encoder reads bytes (mark 1, byte + 3 each, mark 2, padded with 0): diffusers has no tokenizer for that"
    ]
