"""Weights to start a run from, for fine-tuning: those of another run, a diffusers UNet or a single file in the original layout.

Every weight of the UNet must be there and fit. A condition that the source lacks starts at random, and a line says so.
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from duotone.data.refusal import Refused
from duotone.engine import artifact
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.exchange import diffusers_config, diffusers_folder, diffusers_unet, original_layout
from duotone.engine.model.network import Network
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.base import Objective
from duotone.engine.recipe_json import from_json

CLASSES, SINUSOID = "class_embedding.", f"{diffusers_folder.LABEL}linear_1.weight"


def begin_from(
    network: Network,
    path: Path,
    config: UNetConfig,
    objective: Objective | None = None,
    conditioning: tuple = (),
    facts: Facts | None = None,
) -> list[str]:
    """Copies the weights at `path` into the network; returns lines for the user. Raises Refused if the source does not fit."""
    file = weights_file(path)
    given, metadata = artifact.read(file)
    recipe = artifact.recipe_in(metadata, file) if "duotone.recipe" in metadata else None
    told = told_config(file)
    shape = told and diffusers_unet.from_config(told) if recipe is None else recipe.model
    refuse_other_shape(file, shape, config)
    taught = told_objective(file) if recipe is None else meaning(recipe.objective)
    own = dict(network.named_parameters())
    named = by_our_names(given, config, home_of_classes(given, told, own))
    refuse_misfits(named, own, file)
    fitting = {name for name in named.keys() & own.keys() if named[name].shape == own[name].shape}
    theirs, their_facts = label_in(named) if recipe is None else recipe.conditioning, facts_in(metadata)
    others = incompatible_conditions(theirs, their_facts, conditioning, facts)
    fitting -= {name for name in fitting if name.split(".")[1] in others and name.startswith("conditioners.")}
    with torch.no_grad():
        for name in fitting:
            own[name].copy_(named[name])
    lines = notes(fitting, named, own, file) + list(others.values())
    if recipe is None and SINUSOID in fitting:
        lines.append(without_a_null(len(network.conditioners["label"].classes)))
    if objective is not None:
        lines += objective_differences(taught, objective)
    if original_layout.in_original_layout(given):
        lines.append(
            "of a single file only the UNet is read; it does not say how many heads there are, so model.heads is believed"
        )
    return lines


def weights_file(path: Path) -> Path:
    """The safetensors file that a path means: itself, or the one in a run's or diffusers' folder."""
    if path.is_file():
        return path
    for inside in ("ema.safetensors", diffusers_folder.WEIGHTS, f"unet/{diffusers_folder.WEIGHTS}"):
        if (path / inside).is_file():
            return path / inside
    endings = (".safetensors", ".bin", ".ckpt", ".pth", ".index.json")
    others = sorted(p for folder in (path, path / "unet") for p in folder.glob("*") if p.name.endswith(endings))
    seen = (
        f", but {others[0].relative_to(path)}" + (f" and {len(others) - 1} more" if others[1:] else "")
        if others
        else ""
    )
    raise Refused(
        f"start = {path}: there are no weights under a known name{seen}; give a run's folder, a safetensors file, or a "
        f"diffusers folder with {diffusers_folder.WEIGHTS}, which diffusers saves as one file without a variant"
    )


def told_config(file: Path) -> dict | None:
    """The network's configuration in a diffusers folder, or None."""
    beside = file.with_name("config.json")
    if file.name != diffusers_folder.WEIGHTS or not beside.exists():
        return None
    return json_of(beside)


def refuse_other_shape(file: Path, theirs: UNetConfig | None, config: UNetConfig) -> None:
    """Raises Refused with a flag for each field of model that differs, since equal shapes do not mean an equal network."""
    if theirs is None:
        return
    differ = [name for name in vars(theirs) if name not in ("zero_init", "dropout") and not same(theirs, config, name)]
    if differ:
        flags = " ".join(flag(name, getattr(theirs, name)) for name in differ)
        source = file.parent if file.name == diffusers_folder.WEIGHTS else file
        raise Refused(f"start = {source} is another network than model: give {flags}")


def flag(name: str, value) -> str:
    """A field of the model as a command-line flag; a boolean has one flag for True and another for False."""
    name = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--model.{name}" if value else f"--model.no-{name}"
    return f"--model.{name} {written(value)}"


def json_of(file: Path) -> dict:
    try:
        return json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise Refused(f"start: {file} is not readable as JSON ({error}): save the model again") from None


SCHEDULED = ("prediction_type", "beta_schedule", "num_train_timesteps", "sigma_data")
"""Fields of a pipeline's scheduler that decide the meaning of a network's output."""
MEANT = ("prediction", "schedule", "steps", "rescale_zero_snr", "sigma_data")
"""Fields of an objective that do the same."""


def told_objective(file: Path) -> dict:
    """The fields SCHEDULED in a pipeline's scheduler, which say what its network predicts; empty if there is none."""
    beside = file.parent.parent / "scheduler" / "scheduler_config.json"
    if file.name != diffusers_folder.WEIGHTS or not beside.exists():
        return {}
    config = json_of(beside)
    return {name: config[name] for name in SCHEDULED if name in config}


def meaning(objective: Objective) -> dict:
    """The objective's name and its fields MEANT, which say what its network predicts."""
    return {"objective": type(objective).__name__} | {k: v for k, v in vars(objective).items() if k in MEANT}


def objective_differences(theirs: dict, objective: Objective) -> list[str]:
    """A line if the source was trained on another objective than this run's, which the weights then have to unlearn."""
    ours = meaning(objective) if "objective" in theirs else scheduled(objective)
    differ = [f"{name} {value} there, {ours.get(name, 'none')} here" for name, value in theirs.items()
              if ours.get(name, "none") not in (value, None)]  # fmt: skip
    return [f"it was trained on another objective: {', '.join(differ)}"] if differ else []


def scheduled(objective: Objective) -> dict:
    """diffusers' scheduler configuration of an objective; empty if it has none."""
    try:
        return diffusers_config.scheduler_config(objective)
    except diffusers_unet.Inexpressible:
        return {}


def same(theirs: UNetConfig, ours: UNetConfig, name: str) -> bool:
    """Whether a field means the same in both: extra input channels count as input channels, heads only where there is attention."""
    if name in ("in_channels", "extra_channels"):
        return theirs.in_channels + theirs.extra_channels == ours.in_channels + ours.extra_channels
    if name in ("heads", "depth"):
        read = [kind != "none" for kind in ours.attention[:-1]]
        read.append(ours.attention[-1] != "none" or ours.middle in ("self", "cross"))
        pairs = zip(read, getattr(theirs, name), getattr(ours, name))
        return len(theirs.channels) == len(ours.channels) and all(a == b for counts, a, b in pairs if counts)
    if name == "time_width":
        return theirs.embedding_width == ours.embedding_width
    if name == "context_width" and "cross" not in (*ours.attention, ours.middle):
        return True
    return getattr(theirs, name) == getattr(ours, name)


def incompatible_conditions(
    theirs: tuple, their_facts: Facts | None, conditioning: tuple, facts: Facts | None
) -> dict[str, str]:
    """By kind, why conditions whose weights may fit mean something else: rows for other names, or another number of heads."""
    known, found = {condition.kind: condition for condition in theirs}, {}
    for kind, ours in ((condition.kind, condition) for condition in conditioning if condition.kind in known):
        pairs = {}
        if kind in NAMED and their_facts and facts:
            pairs["names"] = (getattr(their_facts, NAMED[kind]), getattr(facts, NAMED[kind]))
        for name in ("heads", "encoder", "port", "encoding"):
            pairs[name] = (getattr(known[kind], name, None), getattr(ours, name, None))
        differ = [f"{name} {written(a)} there, {written(b)} here" for name, (a, b) in pairs.items() if a != b]
        if differ:
            found[kind] = f"its condition {kind} means something else: {'; '.join(differ)}"
    return found


def facts_in(metadata: dict[str, str]) -> Facts | None:
    """The facts of the source's data, if the file has them."""
    return from_json(json.loads(metadata["duotone.facts"])) if "duotone.facts" in metadata else None


def label_in(named: dict[str, Tensor]) -> tuple[Label, ...]:
    """The label condition that corresponds to diffusers' class embedding, if there is one."""
    if SINUSOID in named:
        return (Label(encoding="sinusoid"),)
    return (Label(),) if diffusers_folder.TABLE in named else ()


NAMED = {"label": "classes", "attributes": "attributes", "class_map": "classes"}
"""Kinds whose weights have a row for each name of the data."""


def written(value) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def by_our_names(named: dict[str, Tensor], config: UNetConfig, home: str) -> dict[str, Tensor]:
    """The weights under our names, which begin with unet. or conditioners.; other files have only the UNet's own names.

    A class embedding in such a file is not part of our UNet but of a condition, whose prefix is `home`.
    """
    if any(name.startswith("unet.") for name in named):
        return named
    if original_layout.in_original_layout(named):
        named = original_layout.by_diffusers_names(named, config)
    return {by_our_name(name, home): value for name, value in named.items()}


def by_our_name(name: str, home: str) -> str:
    return home + name.removeprefix(CLASSES) if name.startswith(CLASSES) else f"unet.{name}"


def home_of_classes(given: dict[str, Tensor], told: dict | None, own: dict[str, Tensor]) -> str:
    """Our prefix for their class embedding: the label's (rows, or layers over its number's sinusoid), or a pooled caption's.

    Layers over the sinusoid and over a caption have the same names. A folder says which it has; in a file they are taken to be
    what the network has.
    """
    if f"{CLASSES}weight" in given:
        return diffusers_folder.LABEL
    if told is not None:
        return diffusers_folder.LABEL if told.get("class_embed_type") == "timestep" else diffusers_folder.POOL
    pooled = any(name.startswith(diffusers_folder.POOL) for name in own)
    return diffusers_folder.LABEL if SINUSOID in own and not pooled else diffusers_folder.POOL


def refuse_misfits(named: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> None:
    for name in sorted(name for name in named.keys() | own.keys() if name.startswith("unet.")):
        if name in named and name in own and named[name].shape != own[name].shape:
            there, here = tuple(named[name].shape), tuple(own[name].shape)
            raise Refused(f"start = {file} does not fit model: {name} is {there} there and {here} in the network")
        if (name in named) != (name in own):
            where = "only there" if name in named else "only in the network"
            raise Refused(f"start = {file} does not fit model: {name} is {where}")


def without_a_null(classes: int) -> str:
    """A note for labels by sinusoid, which takes any number, so that diffusers names neither the classes nor a null class."""
    return (
        "conditioners.label reads the sinusoid of a class number: classes are assumed to have the same numbers there as here, and "
        f"the null class is number {classes}, one past the last, which was not trained as one there: use guidance only after "
        "training with dropout here"
    )


def notes(copied: set[str], named: dict[str, Tensor], own: dict[str, Tensor], file: Path) -> list[str]:
    """Lines for the user; a condition of another shape, say for other classes, is not copied and begins at random."""
    lines = [f"beginning from {file}: {len(copied)} tensors"]
    for names, says in ((own.keys() - copied, "begins at random"), (named.keys() - copied, "is left behind")):
        lines += [f"{part} {says}" for part in sorted({".".join(name.split(".")[:2]) for name in names})]
    return lines
