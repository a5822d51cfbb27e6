"""`duotone sample RUN`: draw pictures with a trained model."""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from duotone.data.refusal import Refused
from duotone.engine.speed import SAMPLING, Speed


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Draw pictures with a trained model."""

    prompt: tuple[str, ...] = ()
    """Captions to draw, for a text model."""
    label: tuple[str, ...] = ()
    """Classes to draw, by name or number."""
    attribute: tuple[str, ...] = ()
    """Attributes of every picture: NAME (present), NAME=0 (absent), NAME=1:3 or NAME=0:3 (with a guidance scale of its own)."""
    image: tuple[Path, ...] = ()
    """Pictures to sharpen, or with --mask to fill, for a model that is conditioned on an image."""
    mask: tuple[Path, ...] = ()
    """For each --image, or once for all, a picture that is white where it is to be filled."""
    negative: str | None = None
    """Caption to steer away from."""
    count: int = 1
    """Pictures of each prompt or label."""
    guidance: float = 2.0
    """Guidance scale: 1 = none."""
    guide: Path | None = None
    """Be led away from this weaker model instead of the null state, as from an early checkpoint: autoguidance."""
    interval: tuple[float, float] = (0.0, math.inf)
    """Noise levels sigma between which pictures are guided; outside a step costs one forward pass instead of two."""
    steps: int = 25
    sampler: str = "heun"
    """euler, heun, dpmpp_2m, ancestral or stochastic_heun."""
    seed: int = 0
    size: int | None = None
    """Side in pixels; by default as trained."""
    columns: int | None = None
    """Pictures per row of the sheet."""
    gif: Path | None = None
    """Also write how the pictures come out of noise, as a GIF."""
    out: Path = Path("sample.png")
    """Where the sheet goes; refused if it exists."""
    overwrite: bool = False
    """Replace an existing sheet."""
    speed: Speed = SAMPLING
    """Device, precision and switches: bf16 on a GPU, fp32 on a CPU."""

    def run(self, path: Path) -> None:
        from duotone.engine import pictures
        from duotone.engine.artifact import load

        self.check()
        model = load(path, speed=self.speed)
        asked, images = self.asked(model.network.unet.config.out_channels)
        drawn, frames = self.draw(model, asked, images)
        columns = self.columns or min(images, max(self.count, 8))
        self.out.parent.mkdir(parents=True, exist_ok=True)
        pictures.grid(drawn, columns).save(self.out)
        if self.gif is not None:
            self.gif.parent.mkdir(parents=True, exist_ok=True)
            pictures.save_gif(self.gif, [pictures.grid(np.concatenate(frame), columns) for frame in frames])
        print(f"{images} pictures in {self.out}, {model.forwards:.1f} forward passes each")

    def check(self) -> None:
        for path in (self.out, self.gif):
            if path is not None and path.exists() and not self.overwrite:
                raise Refused(f"{path} exists: give another --{'out' if path == self.out else 'gif'}, or --overwrite")
        if self.count < 1:
            raise Refused(f"count = {self.count}: it must be at least 1")
        if self.mask and len(self.mask) not in (1, len(self.image)) or len(self.mask) > len(self.image):
            raise Refused(f"{len(self.mask)} masks for {len(self.image)} images: give one for each, or one for all")

    def asked(self, channels: int) -> tuple[dict, int]:
        """Keyword arguments of sample(), and the number of pictures."""
        asked: dict = {}
        named = {"prompts": self.prompt, "labels": self.label}
        named["holes" if self.mask else "images"] = self.pictures(channels)
        for name, values in named.items():
            if values:
                asked[name] = [v for v in values for _ in range(self.count)]
        images = len(next(iter(asked.values()))) if asked else self.count
        if self.attribute:
            asked["attributes"] = [self.attributes()[0]] * images
        return (asked or {"count": images}), images

    def pictures(self, channels: int) -> list:
        """The given pictures, each with its mask where there are any."""
        from duotone.engine.pictures import read

        images = [read(path, channels) for path in self.image]
        if not self.mask:
            return images
        masks = [read(path, 1)[:, :, 0] > 127 for path in self.mask]
        return list(zip(images, masks * (len(images) // len(masks)), strict=True))

    def attributes(self) -> tuple[dict[str, int], dict[str, float]]:
        """What every picture is asked to have, and the scales of those that have one of their own."""
        states, scales = {}, {}
        for text in self.attribute:
            found = re.fullmatch(r"([^=]+)(?:=([01])(?::([\d.]+))?)?", text)
            if not found:
                raise Refused(f"attribute {text!r}: write NAME, NAME=0, or NAME=1:3 for a guidance scale of 3")
            name, state, scale = found.groups()
            states[name] = int(state or 1)
            scales |= {name: float(scale)} if scale else {}
        return states, scales

    def draw(self, model, asked: dict, images: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
        """The pictures and, for a GIF, every step's idea of them, chunk by chunk."""
        from duotone.engine.artifact import load
        from duotone.engine.pictures import pixels
        from duotone.engine.sample import sample

        frames: list[list[np.ndarray]] = []

        def keep(step: int, x_NCHW, denoised_NCHW) -> None:
            frames.extend([] for _ in range(step + 1 - len(frames)))
            frames[step].append(pixels(denoised_NCHW))

        drawn = sample(
            model,
            **asked,
            negative={"prompts": [self.negative] * images} if self.negative else None,
            guidance=self.attributes()[1] or (1.0 if "count" in asked and self.guide is None else self.guidance),
            interval=self.interval,
            guide=load(self.guide, speed=self.speed) if self.guide else None,
            steps=self.steps,
            sampler=self.sampler,
            seed=self.seed,
            size=self.size,
            on_step=keep if self.gif is not None else None,
            progress=sys.stderr.isatty(),
        )
        return drawn, frames
