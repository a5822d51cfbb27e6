"""A recipe is a whole run as data: frozen dataclasses, overridden on the command line, stored as JSON beside the weights."""

import dataclasses
import importlib
import json
import os
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.command_line import parse
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.temperature import Temperature
from duotone.engine.conditioning.text import ByteText, ClipText, EncoderText
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.optimizer import AdamW, Ema
from duotone.engine.preview import Previews
from duotone.engine.speed import Speed
from duotone.engine.zero import Zero

Condition = ClipText | ByteText | EncoderText | Label | Attributes | ClassMap | LowResolution | Hole | Temperature
Objectives = EDM | DDPM | Flow


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run."""

    name: str
    """Names the run; its folder is runs/<name> unless --out is given."""
    data: Shards = Shards()
    conditioning: tuple[Condition, ...] = ()
    """What the network is told."""
    objective: Objectives = EDM()
    """What the network learns to predict."""
    model: UNetConfig = UNetConfig()
    optimizer: AdamW = AdamW()
    ema: Ema = Ema()
    zero: Zero = Zero()
    speed: Speed = Speed()
    checkpoint: Checkpoints = Checkpoints()
    preview: Previews = Previews()
    log: Log = Log()
    batch_size: int = 128
    """Images per optimizer step, over all ranks."""
    accumulation: int | None = None
    """Micro-batches per rank and optimizer step; by default as few as fit into the GPU's memory, one on a CPU."""
    images: int = 10_000_000
    """Training budget in images."""
    drop_together: float = 0.0
    """Share of images that lose all their conditions together in training, as guidance's null branch does."""
    flip: bool = False
    """Mirror images at random."""
    seed: int = 0
    """Seed of every random number of the run."""
    start: Path | None = None
    """Weights to begin from instead of random ones: a run's folder, a safetensors file, or a diffusers UNet folder."""
    out: Path | None = None
    """The run's folder."""
    fresh: bool = False
    """Start anew; the folder of an earlier run is moved aside."""

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.name

    def check(self) -> None:
        """Refuses values out of range, naming the key, before anything heavy is loaded."""
        for name in ("batch_size", "images", *(["accumulation"] if self.accumulation is not None else [])):
            at_least(name, getattr(self, name), 1)
        for name in ("checkpoint.every", "preview.every", "seed", "preview.steps"):
            at_least(name, value_at(self, name), 0)
        if self.images % self.batch_size:
            rounded = max(1, round(self.images / self.batch_size)) * self.batch_size
            raise Refused(
                f"images = {self.images} is no multiple of batch_size = {self.batch_size}: {rounded} would be"
            )
        for name in ("checkpoint.every", "preview.every"):
            if value_at(self, name) % self.batch_size:
                raise Refused(f"{name} = {value_at(self, name)} is no multiple of batch_size = {self.batch_size}")
        self.model.check()
        self.objective.check()
        self.optimizer.check()
        self.check_size()
        self.check_conditioning()

    def check_size(self) -> None:
        if self.data.size < 1:
            raise Refused(f"data.size = {self.data.size}: it must be at least 1")
        if self.model.in_channels != self.data.channels:
            raise Refused(f"model.in_channels = {self.model.in_channels}, but data.channels = {self.data.channels}")

    def check_conditioning(self) -> None:
        kinds = [condition.kind for condition in self.conditioning]
        if len(set(kinds)) < len(kinds):
            raise Refused(f"conditioning names a kind twice: {', '.join(kinds)}")
        for i, condition in enumerate(self.conditioning):
            if not 0 <= condition.dropout <= 1:
                raise Refused(f"conditioning.{i}.dropout = {condition.dropout}: it must lie in [0, 1]")
        if not 0 <= self.drop_together <= 1:
            raise Refused(f"drop_together = {self.drop_together}: it must lie in [0, 1]")
        if kinds == ["temperature"]:
            raise Refused("conditioning has a Temperature, but nothing that it could guide: add a condition")
        reads_tokens = "cross" in (*self.model.attention, self.model.middle)
        gives_tokens = any(condition.port == "tokens" for condition in self.conditioning)
        if reads_tokens != gives_tokens:
            raise Refused(
                "model.attention has cross levels, but no condition gives tokens"
                if reads_tokens
                else "a condition gives tokens, but model.attention and model.middle have no cross level that reads them"
            )
        for condition in self.conditioning:
            if isinstance(condition, ByteText) and condition.width != self.model.context_width:
                raise Refused(
                    f"model.context_width = {self.model.context_width}, but the text's width is {condition.width}"
                )

    def micro_batch(self, ranks: int) -> int:
        """Images per rank and forward pass."""
        times = self.accumulation or 1
        micro, rest = divmod(self.batch_size, ranks * times)
        if rest or not micro:
            raise Refused(f"batch_size = {self.batch_size} is not divisible by {ranks} ranks x accumulation = {times}")
        return micro


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise Refused(f"{name} = {value}: it must be at least {least}")


def value_at(recipe: Recipe, dotted: str):
    value = recipe
    for part in dotted.split("."):
        value = getattr(value, part)
    return value


# ------------------------------------------------------------------------------------------------- command line


def main(recipe: Recipe, embedded: Recipe | None = None) -> None:
    """Runs a recipe file: overrides from the command line, then training; refused input is one line and exit code 2.

    `embedded` is the small network for the embedded data set: it is taken where no --data.shards is given, and, for data of
    one's own, with --small.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith(("--local_rank", "--local-rank"))]
    try:
        recipe = parse(Recipe, without_small(arguments), default=base_of(recipe, embedded, arguments))
        recipe.check()
        from duotone.engine.train import train

        train(recipe)
    except Refused as refusal:
        say(f"refused: {refusal}", file=sys.stderr)
        sys.exit(2)


def base_of(recipe: Recipe, embedded: Recipe | None, arguments: list[str]) -> Recipe:
    """The recipe that the command line's overrides are laid over."""
    small = "--small" in arguments
    if embedded is None and small:
        raise Refused(f"--small: {recipe.name} has no small network of its own")
    if small:
        return embedded
    if embedded is None or any(a.split("=")[0] == "--data.shards" for a in arguments):
        return recipe
    say(
        f"no --data.shards: training a small network on the embedded captioned shapes. The full {recipe.name} recipe: "
        "duotone prepare --help, then --data.shards DIR (with --small for the small network on your data)"
    )
    return embedded


def without_small(arguments: list[str]) -> list[str]:
    return [a for a in arguments if a != "--small"]


def say(line: str, **to) -> None:
    """One line of output, from rank 0 only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"duotone: {line}", flush=True, **to)


# --------------------------------------------------------------------------------------------------------- JSON


def to_json(value) -> object:
    """A dataclass tree as plain JSON values; each dataclass names its type."""
    if dataclasses.is_dataclass(value):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": f"{type(value).__module__}:{type(value).__qualname__}", **fields}
    if isinstance(value, tuple | list):
        return [to_json(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def from_json(value, kind=None) -> object:
    """The dataclass tree back; only dataclasses inside duotone are built."""
    if isinstance(value, dict) and "type" in value:
        cls = dataclass_named(value["type"])
        hints = typing.get_type_hints(cls)
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{k: from_json(v, hints[k]) for k, v in value.items() if k in known})
    if isinstance(value, list):
        return tuple(from_json(v) for v in value)
    return Path(value) if isinstance(value, str) and wants_path(kind) else value


def wants_path(kind) -> bool:
    return kind is Path or (isinstance(kind, types.UnionType) and Path in typing.get_args(kind))


def dataclass_named(name: str) -> type:
    module, _, cls = name.partition(":")
    if not module.startswith("duotone.") or not re.fullmatch(r"[\w.]+", module) or not cls.isidentifier():
        raise Refused(f"recipe names the type {name!r}, which is not one of duotone's")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError):
        raise Refused(f"recipe names the type {name!r}, which this version of duotone does not have") from None
    if not dataclasses.is_dataclass(found):
        raise Refused(f"recipe names the type {name!r}, which is no configuration")
    return found


def flat(value, prefix: str = "") -> dict[str, object]:
    """A JSON tree as dotted keys."""
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in flat(inner, f"{prefix}{name}.").items()}
    if isinstance(value, list) and any(isinstance(v, dict) for v in value):
        return {k: v for i, inner in enumerate(value) for k, v in flat(inner, f"{prefix}{i}.").items()}
    return {prefix[:-1]: value}


FREE = (
    "data.shards",
    "out",
    "fresh",
    "log.",
    "checkpoint.",
    "preview.",
    "speed.",
    "zero.",
    "accumulation",
    "data.decoder",
    "data.threads",
)


def differences(stored: dict, recipe: Recipe) -> list[str]:
    """The fields by which a stored recipe is another run than this one; what leaves the numbers alone does not count."""
    then, now = flat(stored), flat(json.loads(json.dumps(to_json(recipe))))
    free = (*FREE, "images") if recipe.optimizer.schedule == "constant" else FREE
    changed = [k for k in sorted(then.keys() | now.keys()) if then.get(k) != now.get(k) and not k.startswith(free)]
    return [f"{key}: {then.get(key)} there, {now.get(key)} here" for key in changed]
