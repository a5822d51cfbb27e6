"""`duotone sample RUN`: draw pictures with a trained model."""

import inspect
import itertools
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from duotone.data.refusal import Refused, at_least
from duotone.engine.conditioning.attributes import states_in
from duotone.engine.speed import SAMPLING, Speed

if TYPE_CHECKING:
    from duotone.engine.pictures import ByStep

MOMENTS = 8
"""Steps from noise to picture that a strip shows."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw pictures with a trained model."""

    prompt: tuple[str, ...] = ()
    """Captions to draw, for a model conditioned on text."""
    label: tuple[str, ...] = ()
    """Classes to draw, by name or number."""
    attribute: tuple[str, ...] = ()
    """Attributes of every picture: NAME (present), NAME=0 (absent), NAME=1:3 or NAME=0:3 (with its own guidance scale).
    With commas, each argument is a separate set, as in --attribute "Smiling,Male=0" "Young,Male"."""
    image: tuple[Path, ...] = ()
    """Pictures to sharpen, or with --mask to fill, for a model that is conditioned on an image."""
    mask: tuple[Path, ...] = ()
    """A picture that is white where the image is to be filled: one for each --image, or one for all."""
    own: tuple[str, ...] = ()
    """Conditions of your own, each with a JSON list of values, as in --own "brightness=[0.2, 0.9]" (see duotone --with)."""
    negative: str | None = None
    """Caption to steer away from."""
    count: int = 1
    """Pictures for each prompt, label or set of attributes."""
    guidance: tuple[float, ...] = ()
    """Guidance scale: 1 = none. Several scales draw the same pictures, from the same noise, in one row of the sheet
    each. By default 2, or 1 without a condition or if conditions were never dropped in training."""
    guide: Path | None = None
    """A weaker model to steer away from instead of the null condition, such as an early checkpoint (autoguidance)."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels sigma between which guidance applies; a step outside costs one forward pass instead of two."""
    rescale: float = 0.0
    """How far, 0 to 1, the contrast of the guided prediction is pulled back to that of the conditional one."""
    rule: str = "plain"
    """How guidance combines the predictions: plain, apg (adaptive projected guidance) or cfg++ (scales of 0 to 1, euler)."""
    steps: int = 25
    """Sampling steps."""
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    spacing: str | None = None
    """How noise levels are placed: karras or log-linear; for DDPM also trailing, leading, linspace; for flow trailing, linspace."""
    clip: bool | None = None
    """Limit every step's denoised image to the range of pixels; on by default for DDPM."""
    seed: int = 0
    """Seed of the noise: the same seed starts each picture from the same noise, however many are drawn."""
    size: int | None = None
    """Side in pixels; by default as trained."""
    columns: int | None = None
    """Pictures per row of the sheet; by default a row for each prompt or label, or eight if each has one picture."""
    gif: Path | None = None
    """Also write a GIF of the pictures emerging from noise, as the network predicts them at each step."""
    strip: Path | None = None
    """The same as a sheet: a row of eight moments for each picture."""
    noisy: bool = False
    """In both, show the noisy pictures of each step instead of the predicted ones."""
    out: Path = Path("sample.png")
    """Where the sheet is written; refused if it exists."""
    overwrite: bool = False
    """Replace existing files."""
    speed: Speed = SAMPLING
    """Device, precision and switches: bf16 on a GPU, fp32 on a CPU."""

    def run(self, path: Path) -> None:
        from duotone.engine import pictures
        from duotone.engine.artifact import load

        self.check()
        model = load(path, speed=self.speed)
        self.refuse_own(model)
        asked, images = self.asked(model.network.unet.config.out_channels)
        drawn, seen = self.draw(model, asked, images)
        several = len(self.guidance) > 1
        columns = self.columns or (images if several else self.count if self.count > 1 else min(images, 8))
        pictures.write(self.out, pictures.grid(drawn, columns))
        if self.gif is not None:
            pictures.save_gif(self.gif, [pictures.grid(frame, columns) for frame in seen.images])
        if self.strip is not None:
            pictures.write(self.strip, pictures.grid(seen.strips(MOMENTS), MOMENTS))
        cost = f"{model.forwards:.1f} forward passes each, {model.forwards / model.evaluations:.2f} an evaluation"
        print(f"{len(drawn)} pictures in {self.out}, {cost}{' at the last scale' * several}")

    def check(self) -> None:
        from duotone.engine import pictures

        flags = {flag: path for flag in ("out", "gif", "strip") if (path := getattr(self, flag)) is not None}
        for flag, path in flags.items():
            if path.exists() and not self.overwrite:
                raise Refused(f"{path} exists: give another --{flag}, or --overwrite")
            pictures.refuse_unwritable(path, film=flag == "gif")
        for one, other in itertools.combinations(flags, 2):
            if flags[one].resolve() == flags[other].resolve():
                raise Refused(f"--{other} and --{one} are both {flags[one]}: give each a file of its own")
        if self.noisy and not {"gif", "strip"} & flags.keys():
            raise Refused("--noisy has no effect without --gif or --strip: give one of them")
        self.sets()
        for name in ("count", "columns"):
            if getattr(self, name) is not None:
                at_least(name, getattr(self, name), 1)
        if self.mask and len(self.mask) not in (1, len(self.image)) or len(self.mask) > len(self.image):
            raise Refused(f"{len(self.mask)} masks for {len(self.image)} images: give one for each, or one for all")

    def asked(self, channels: int) -> tuple[dict, int]:
        """Keyword arguments of sample(), and the number of pictures."""
        asked: dict = {}
        named = {"prompts": self.prompt, "labels": self.label}
        named["holes" if self.mask else "images"] = self.pictures(channels)
        named |= self.own_conditions()
        for name, values in named.items():
            if values:
                asked[name] = [v for v in values for _ in range(self.count)]
        images = len(next(iter(asked.values()))) if asked else self.count
        sets = self.sets()
        if len(sets) > 1:
            asked["attributes"] = [states for states in sets for _ in range(self.count)]
            images = len(asked["attributes"])
        elif sets:
            asked["attributes"] = sets * images
        return (asked or {"count": images}), images

    def own_conditions(self) -> dict[str, list]:
        """The values of every --own, by name."""
        values: dict[str, list] = {}
        for name, given in map(own_condition, self.own):
            if name in values:
                raise Refused(f"--own {name} is given twice: give all its values in one list")
            values[name] = given
        return values

    def refuse_own(self, model) -> None:
        """Raises Refused on values that a conditioning of one's own cannot read; its code may raise anything."""
        values = self.own_conditions()
        for conditioner in model.network.conditioners.values():
            given = values.get(conditioner.keyword)
            try:
                if given is not None:
                    conditioner.of_values(given, self.size)
            except Refused:
                raise
            except Exception as error:  # noqa: BLE001
                kind = type(conditioner).__name__
                raise Refused(
                    f"--own {conditioner.keyword}: {kind} cannot read {given} ({type(error).__name__}: {error})"
                ) from None

    def pictures(self, channels: int) -> list:
        """The given pictures, each paired with its mask if there are masks."""
        from duotone.engine.pictures import read

        images = [read(path, channels) for path in self.image]
        if not self.mask:
            return images
        masks = [read(path, 1)[:, :, 0] > 127 for path in self.mask]
        return list(zip(images, masks * (len(images) // len(masks)), strict=True))

    @property
    def has_sets(self) -> bool:
        return any("," in text for text in self.attribute)

    def sets(self) -> list[dict[str, int]]:
        """The attributes that pictures are asked to have: one set for all, or with commas a set for each row."""
        if self.has_sets:
            return [states_in(text) for text in self.attribute]
        return [self.attributes()[0]] if self.attribute else []

    def attributes(self) -> tuple[dict[str, int], dict[str, float]]:
        """The attributes asked of every picture, and the guidance scales of those that have their own."""
        states, scales = {}, {}
        for text in () if self.has_sets else self.attribute:
            found = re.fullmatch(r"([^=]+)(?:=([01])(?::(\d+(?:\.\d*)?|\.\d+))?)?", text)
            if not found:
                raise Refused(f"attribute {text!r}: write NAME, NAME=0, or NAME=1:3 for a guidance scale of 3")
            name, state, scale = found.groups()
            if name in states:
                raise Refused(f"attribute {name!r} is given twice: give it once")
            states[name] = int(state or 1)
            scales |= {name: float(scale)} if scale else {}
        return states, scales

    def draw(self, model, asked: dict, images: int) -> tuple[np.ndarray, "ByStep"]:
        """The pictures and, if a GIF or a strip shows them, their steps out of noise."""
        from duotone.engine.artifact import load
        from duotone.engine.pictures import ByStep
        from duotone.engine.sample import sample
        from duotone.engine.sampling.guiding.named import rule_named

        guide = load(self.guide, speed=self.speed) if self.guide else None
        shown = self.gif is not None or self.strip is not None
        seen = ByStep(model.objective.falling_sigmas(self.steps, self.spacing) if self.noisy else None)
        drawn = [
            sample(
                model,
                **asked,
                negative={"prompts": [self.negative] * images} if self.negative is not None else None,
                guidance=scale,
                rescale=self.rescale,
                rule=rule_named(self.rule),
                interval=self.interval,
                guide=guide,
                steps=self.steps,
                sampler=self.sampler,
                spacing=self.spacing,
                clip=self.clip,
                seed=self.seed,
                size=self.size,
                on_step=seen if shown else None,
                progress=sys.stderr.isatty(),
            )
            for scale in self.scales(asked, model)
        ]
        return np.concatenate(drawn), seen

    def scales(self, asked: dict, model) -> tuple:
        """The `guidance` of sample(), for each row of the sheet."""
        named = self.attributes()[1]
        if named and self.guidance:
            raise Refused(f"--guidance is given with scales by attribute ({', '.join(named)}): give one or the other")
        if named:
            return (named,)
        away_from = (
            self.guide is not None or "count" not in asked and (model.can_be_guided or self.negative is not None)
        )
        scales = self.guidance or (2.0 if away_from else 1.0,)
        steers = self.guide is not None or self.negative is not None or self.rescale or self.interval != (0.0, math.inf)
        if steers and self.rule == "plain" and set(scales) == {1.0}:
            raise Refused(
                "--negative, --guide, --interval and --rescale have no effect at guidance 1: give more, or leave them out"
            )
        return scales


def own_condition(text: str) -> tuple[str, list]:
    """The name and the values of one --own."""
    from duotone.engine.sample import sample

    name, _, written = text.partition("=")
    try:
        values = json.loads(written)
    except ValueError:
        values = None
    if not name.isidentifier() or not isinstance(values, list) or not values:
        raise Refused(f'--own {text}: write a name, = and a JSON list, as in "brightness=[0.2, 0.9]"')
    if name in inspect.signature(sample).parameters:
        raise Refused(f"--own {name}: this is no condition of your own; duotone sample --help lists its flag")
    return name, values
