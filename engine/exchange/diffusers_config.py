"""diffusers' configuration of a recipe: its UNet with what the conditions add to it, and a scheduler for its objective."""

from duotone.engine.exchange.diffusers_unet import Inexpressible, to_config
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe


def config_of(recipe: Recipe, classes: int) -> dict:
    """diffusers' config.json for a recipe's network and what its conditions add to it; raises Inexpressible with the reason."""
    kinds = {condition.kind: condition for condition in recipe.conditioning}
    others = sorted(kinds.keys() - {"label", "text"})
    if others:
        raise Inexpressible(f"the condition {', '.join(others)}")
    config = to_config(recipe.model, recipe.data.size, classes + 1 if "label" in kinds else None)
    if getattr(kinds.get("label"), "port", "vector") == "tokens":
        raise Inexpressible("a label as a token")
    # To diffusers, a pooled caption added to the time embedding is a projected class embedding.
    if not getattr(kinds.get("text"), "pooled", False):
        return config
    if "label" in kinds:
        raise Inexpressible("a label and a pooled caption, both added to the time embedding")
    return config | {
        "class_embed_type": "projection",
        "projection_class_embeddings_input_dim": recipe.model.context_width,
    }


def scheduler_config(objective) -> dict:
    """diffusers' scheduler configuration for an objective; raises Inexpressible if there is none."""
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
            "timestep_spacing": "trailing",  # as in sample(); diffusers' default starts below the last timestep
        }
    if isinstance(objective, Flow):
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": objective.shift}
    raise Inexpressible(f"it has no scheduler for the objective {type(objective).__name__}")


def why_not(recipe: Recipe) -> str | None:
    """Why diffusers cannot hold the network that a recipe trains, or None if it can."""
    try:
        config_of(recipe, classes=1)
        scheduler_config(recipe.objective)
    except Inexpressible as refusal:
        return refusal.reason
    return None
