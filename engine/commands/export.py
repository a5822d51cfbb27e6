"""`duotone export RUN`: write a model as one file or as a folder for diffusers."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from duotone.data.refusal import Refused


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a model as one safetensors file, or as a folder that diffusers loads."""

    out: Path
    """File or folder to write; refused if it exists."""
    format: Literal["safetensors", "diffusers"] = "diffusers"
    """A file for `duotone sample` and Python, or a folder for diffusers; notes are printed on what that cannot hold."""

    def run(self, path: Path) -> None:
        from duotone.engine import artifact, model_card
        from duotone.engine.exchange import diffusers_folder
        from duotone.engine.run_folder import made

        if os.path.lexists(self.out):
            raise Refused(f"{self.out} exists and nothing was written: give another --out")
        made(self.out.parent)
        model = artifact.load(path, "cpu")
        if self.format == "safetensors":
            named = {name: p.detach() for name, p in model.network.named_parameters()}
            artifact.save(self.out, named, model.recipe, model.facts, model.images)
            card = self.out.with_suffix(".md")
            if not card.exists():
                model_card.write(card, model.recipe, model.facts, None, model.images, self.out.name)
            notes = []
        else:
            notes = diffusers_folder.export(model, self.out)
        print(f"written: {self.out}")
        for note in notes:
            print(f"note: {note}")
