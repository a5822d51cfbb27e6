"""`duotone sample RUN`: draw pictures with a trained model."""

import sys
from dataclasses import dataclass
from pathlib import Path

from duotone.data.refusal import Refused


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
            progress=sys.stderr.isatty(),
        )
        self.out.parent.mkdir(parents=True, exist_ok=True)
        pictures.grid(drawn, self.columns or min(images, max(self.count, 8))).save(self.out)
        print(f"{images} pictures in {self.out}, {model.forwards:.1f} forward passes each")
