"""What a user keeps: the EMA weights and the recipe in one safetensors file, loaded without unpickling anything."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from duotone.data.refusal import Refused
from duotone.data.whole_file import as_opened, draft_of
from duotone.engine import speed as switches
from duotone.engine.checkpoint import known
from duotone.engine.conditioning.base import Facts
from duotone.engine.log import say
from duotone.engine.model.network import Network
from duotone.engine.model.uncertainty import Uncertainty
from duotone.engine.objectives.base import Objective
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import from_json, to_json, unknown_fields
from duotone.kernels.self_test import checked_once

WHAT_IS_LEARNED = ("model.", "objective.", "conditioning.")


@dataclass
class Model:
    """A trained network with everything needed to sample from it."""

    network: Network
    objective: Objective
    facts: Facts
    recipe: Recipe
    images: int = 0
    """Images it was trained on."""
    forwards: float = field(default=0.0, compare=False)
    """Cost of the last sampling, in forward passes per image."""
    evaluations: int = field(default=0, compare=False)
    """How often the last sampling evaluated the denoiser; with plain guidance each evaluation is 2 forward passes."""

    @property
    def size(self) -> int:
        return self.recipe.data.size

    @property
    def device(self) -> torch.device:
        return self.network.device

    @property
    def can_be_guided(self) -> bool:
        """Whether every conditioner's null condition was trained, or the network is given the guidance scale itself."""
        conditioners = self.network.conditioners
        return bool(conditioners) and ("temperature" in conditioners or self.can_draw_unconditionally)

    @property
    def can_draw_unconditionally(self) -> bool:
        """Whether it can draw without any condition, since the null condition of every conditioner was trained."""
        return all(map(self.null_is_trained, self.network.conditioners))

    def null_is_trained(self, kind: str, *, alone: bool = False) -> bool:
        """Whether training showed the network the null condition of this kind: `alone`, or else perhaps only together
        with all the others'; that of a temperature is plain prediction."""
        together = self.recipe.drop_together > 0 and not (alone and len(self.network.conditioners) > 1)
        return kind == "temperature" or together or self.network.conditioners[kind].dropout > 0


def build(recipe: Recipe, facts: Facts) -> Network:
    """The network of a recipe, freshly initialised."""
    conditioners = [c.build(recipe.model, facts) for c in recipe.conditioning]
    uncertainty = Uncertainty(recipe.objective.time_unit) if recipe.objective.uncertainty else None
    return Network(recipe.model.build(), conditioners, uncertainty)


def save(path: Path, named: dict[str, Tensor], recipe: Recipe, facts: Facts, images: int) -> None:
    """Writes a model's single file, whole or not at all."""
    with draft_of(path) as draft:
        save_file({name: value.contiguous() for name, value in named.items()}, draft, header(recipe, facts, images))
        as_opened(draft)


def header(recipe: Recipe, facts: Facts, images: int) -> dict[str, str]:
    """The header that makes a file of weights a model: strings only, and no local path except a text encoder's."""
    stored = to_json(recipe)
    stored["out"] = stored["start"] = None
    stored["data"]["shards"] = None
    return {
        "format": "pt",
        "duotone.recipe": json.dumps(stored),
        "duotone.facts": json.dumps(to_json(facts)),
        "duotone.images": str(images),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "duotone-unet",
        "modelspec.implementation": "duotone",
        "modelspec.title": recipe.name,
        "modelspec.resolution": f"{recipe.data.size}x{recipe.data.size}",
    }


def load(
    path: str | Path, device: str | torch.device | None = None, *, speed: switches.Speed = switches.SAMPLING
) -> Model:
    """A model from a run, a checkpoint or an ema.safetensors, ready to sample from; raises Refused on anything else.

    It samples in bf16 on a GPU and in fp32 on a CPU, unless `speed` says otherwise; `device` is short for speed.device.
    """
    path = Path(path)
    file = path / "ema.safetensors" if path.is_dir() else path
    if not file.exists():
        raise Refused(f"{file} does not exist: {instead_of(path)}")
    named, metadata = read(file)
    recipe = recipe_in(metadata, file)
    facts = from_json(json.loads(metadata["duotone.facts"]))
    network = build(recipe, facts)
    fill(network, named, file)
    move_for_sampling(network, device, speed)
    return Model(network, recipe.objective, facts, recipe, int(metadata["duotone.images"]))


def recipe_of(file: Path) -> Recipe:
    """The recipe in a file's header."""
    return recipe_in(read(file, tensors=False)[1], file)


def recipe_in(metadata: dict[str, str], file: Path) -> Recipe:
    if "duotone.recipe" not in metadata:
        raise Refused(f"{file} was not written by duotone: its header has no duotone.recipe")
    stored = json.loads(metadata["duotone.recipe"])
    recipe = from_json(stored)
    for name, value in unknown_fields(stored, recipe).items():
        if value and name.startswith(WHAT_IS_LEARNED):
            raise Refused(
                f"{file} says {name} = {value!r}, which this version of duotone does not know: update duotone"
            )
    return recipe


def instead_of(path: Path) -> str:
    """What to give instead of a path that holds no model."""
    checkpoints = known(path / "checkpoints")
    if checkpoints:
        return f"the run has not ended; give its checkpoint {checkpoints[-1]}"
    if (path / "unet").is_dir():
        return "this is a folder for diffusers; give the run, or a file from `duotone export --format safetensors`"
    return "train first, or give the path of an ema.safetensors"


def read(file: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of a safetensors file; raises Refused if it cannot be read as one."""
    try:
        with safe_open(file, framework="pt") as opened:
            names = opened.keys() if tensors else ()
            return {name: opened.get_tensor(name) for name in names}, opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise Refused(f"{file} is not a readable safetensors file ({error})") from None


def move_for_sampling(network: Network, device: str | torch.device | None, speed: switches.Speed) -> None:
    """Moves a network to the device it samples on, and sets its switches."""
    if device is not None:
        speed = replace(speed, device=torch.device(device).type)
    choice = switches.choose(speed)
    if choice.device == "cuda" or speed.threads:
        switches.set_up(speed, choice)
    if choice.device == "cuda":
        for line in checked_once(torch.device(device or "cuda"), speed.norms_in_turns, speed.norms_join_skips):
            say(line)
    network.eval().requires_grad_(False).to(device or choice.device, choice.dtype)
    network.records = speed.cuda_graphs and choice.device == "cuda"
    # The network is recorded whole: if Inductor recorded its blocks as well, they would reuse each other's memory.
    switches.make_ready(network.unet, replace(speed, cuda_graphs=False), choice)


def fill(network: nn.Module, named: dict[str, Tensor], source: Path) -> None:
    """Copies named weights into a network; raises Refused if any is missing, left over or of another shape."""
    own = dict(network.named_parameters())
    for name in sorted(own.keys() | named.keys()):
        there = tuple(named[name].shape) if name in named else "absent"
        here = tuple(own[name].shape) if name in own else "absent"
        if there != here:
            raise Refused(f"{source} does not fit its own recipe: {name} is {there} there and {here} in the network")
    with torch.no_grad():
        for name, value in named.items():
            own[name].copy_(value)
