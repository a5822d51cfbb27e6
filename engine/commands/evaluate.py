"""`duotone evaluate RUN`: measure a trained model."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path


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

            command = (
                f"duotone evaluate RUN --per-caption {self.per_caption} --guidance {self.guidance} --steps {self.steps}"
            )
            write_json(self.json, {"command": f"{command} --seed {self.seed}", **values, "checker": checker})
