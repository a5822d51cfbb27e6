"""A folder that diffusers loads: the network's weights under their names, its configuration, the scheduler of its objective."""

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
from duotone.engine.exchange.diffusers_unet import Inexpressible, to_config
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe

WEIGHTS = "diffusion_pytorch_model.safetensors"
LABEL, POOL = "conditioners.label.embedding.", "conditioners.text.pool."
TABLE = f"{LABEL}weight"


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
