"""The `duotone` command: prepare, sample, export, evaluate, estimate, doctor. Each is a dataclass whose fields are its flags."""

import dataclasses
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duotone.data.refusal import Refused

PREPARE = {
    "coco": ("duotone.data.prepare.coco", "PrepareCoco", "COCO captions and images"),
    "folder": ("duotone.data.prepare.image_folder", "PrepareFolder", "a folder of pictures; sub-folders are classes"),
    "idx": ("duotone.data.prepare.idx", "PrepareIdx", "MNIST-format files: MNIST, Fashion-MNIST"),
    "cifar10": ("duotone.data.prepare.cifar10", "PrepareCifar10", "CIFAR-10, binary or Python version"),
    "celeba": ("duotone.data.prepare.celeba", "PrepareCeleba", "CelebA with its attributes"),
}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw pictures with a trained model."""

    prompt: tuple[str, ...] = ()
    """Captions to draw, for a text model."""
    label: tuple[str, ...] = ()
    """Classes to draw, by name or number."""
    negative: str | None = None
    """Caption to steer away from."""
    count: int = 1
    """Pictures of each prompt or label."""
    guidance: float = 2.0
    """Guidance scale: 1 = none."""
    steps: int = 25
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    seed: int = 0
    size: int | None = None
    """Side in pixels; by default as trained."""
    columns: int | None = None
    """Pictures per row of the sheet."""
    out: Path = Path("sample.png")
    """Where the sheet goes; refused if it exists."""
    overwrite: bool = False
    """Replace an existing sheet."""

    def run(self, path: Path) -> None:
        from duotone.engine import pictures
        from duotone.engine.artifact import load
        from duotone.engine.sample import sample

        if self.out.exists() and not self.overwrite:
            raise Refused(f"{self.out} exists: give another --out, or --overwrite")
        if self.count < 1:
            raise Refused(f"count = {self.count}: it must be at least 1")
        model = load(path)
        asked: dict = {}
        for name, values in (("prompts", self.prompt), ("labels", self.label)):
            if values:
                asked[name] = [v for v in values for _ in range(self.count)]
        images = len(next(iter(asked.values()))) if asked else self.count
        negative = {"prompts": [self.negative] * images} if self.negative else None
        guidance = self.guidance if asked else 1.0
        drawn = sample(
            model,
            **(asked or {"count": images}),
            negative=negative,
            guidance=guidance,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
            size=self.size,
        )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        pictures.grid(drawn, self.columns or min(images, max(self.count, 8))).save(self.out)
        print(f"{images} pictures in {self.out}, {model.forwards:.1f} forward passes each")


@dataclass(frozen=True, kw_only=True)
class Export:
    """Hand a model on: one safetensors file, or a folder that diffusers loads."""

    out: Path
    """File or folder to write; refused if it exists."""
    format: Literal["safetensors", "diffusers"] = "diffusers"

    def run(self, path: Path) -> None:
        from duotone.engine import artifact, diffusers_folder

        if self.out.exists():
            raise Refused(f"{self.out} exists: give another --out, nothing was written")
        model = artifact.load(path, "cpu")
        if self.format == "safetensors":
            self.out.parent.mkdir(parents=True, exist_ok=True)
            named = {name: p.detach() for name, p in model.network.named_parameters()}
            artifact.save(self.out, named, model.recipe, model.facts, model.images)
            notes = []
        else:
            notes = diffusers_folder.export(model, self.out)
        print(f"written: {self.out}")
        for note in notes:
            print(f"note: {note}")


@dataclass(frozen=True, kw_only=True)
class Evaluate:
    """Measure a model trained on the embedded captioned shapes: does each picture show what its caption says?"""

    per_caption: int = 1
    """Pictures of each caption."""
    guidance: float = 2.0
    steps: int = 18
    seed: int = 1
    json: Path | None = None
    """Also write the result here."""

    def run(self, path: Path) -> None:
        from duotone.engine.artifact import load
        from duotone.engine.evaluate.captioned_shapes import obedience

        result = obedience(
            load(path), per_caption=self.per_caption, guidance=self.guidance, steps=self.steps, seed=self.seed
        )
        values = dataclasses.asdict(result)
        checker = values.pop("checker")
        print(f"{result.samples} pictures, one for each caption, guidance {self.guidance}")
        for name, value in list(values.items())[1:]:
            own = f"   (checker on real renders: {checker[name]:.1%})" if name in checker else ""
            print(f"  {name.replace('_', ' '):24} {value:6.1%}{own}")
        if self.json:
            from duotone.engine.run_folder import write_json

            command = f"duotone evaluate RUN --per-caption {self.per_caption} --guidance {self.guidance} --steps {self.steps}"
            write_json(self.json, {"command": f"{command} --seed {self.seed}", **values, "checker": checker})


COMMANDS = {"sample": Sample, "export": Export, "evaluate": Evaluate}

USAGE = f"""usage: duotone COMMAND [flags]

  prepare WHAT    make WebDataset shards: {", ".join(PREPARE)}
  sample RUN      draw pictures with a trained model (a run's folder or its ema.safetensors)
  export RUN      one safetensors file, or a folder that diffusers loads
  evaluate RUN    does each picture show what its caption says?

duotone COMMAND --help lists the flags."""


def main(arguments: list[str] | None = None) -> None:
    """The command's entry: refused input is one line and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        dispatch(arguments)
    except Refused as refusal:
        print(f"duotone: refused: {refusal}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:
        sys.exit(1)


def dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return
    command, rest = arguments[0], arguments[1:]
    if command == "prepare":
        prepare(rest)
    elif command in COMMANDS:
        on_a_model(command, rest)
    else:
        raise Refused(f"unknown command {command!r}: there are prepare, {', '.join(COMMANDS)}")


def on_a_model(command: str, rest: list[str]) -> None:
    """A command whose first word is a run's folder or file."""
    wants_help = any(a in ("-h", "--help") for a in rest)
    if not wants_help and (not rest or rest[0].startswith("-")):
        raise Refused(f"duotone {command} needs a run's folder or an ema.safetensors as its first word")
    flags = [a for a in rest if a in ("-h", "--help")] if wants_help else rest[1:]
    flags_of(COMMANDS[command], flags, f"duotone {command} RUN").run(None if wants_help else Path(rest[0]))


def prepare(rest: list[str]) -> None:
    if not rest or rest[0] in ("-h", "--help"):
        print("usage: duotone prepare WHAT [flags]\n")
        print("\n".join(f"  {name:8}  {text}" for name, (_, _, text) in PREPARE.items()))
        return
    if rest[0] not in PREPARE:
        raise Refused(f"unknown data {rest[0]!r}: there are {', '.join(PREPARE)}")
    module, cls, _ = PREPARE[rest[0]]
    summary = flags_of(getattr(importlib.import_module(module), cls), rest[1:], f"duotone prepare {rest[0]}").run()
    print(json.dumps(summary, default=str))


def flags_of(cls: type, flags: list[str], name: str):
    """The dataclass from its flags; a mistake is one line."""
    from duotone.engine.command_line import parse

    return parse(cls, flags, name=name)


if __name__ == "__main__":
    main()
