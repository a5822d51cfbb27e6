"""The folder of a run: which run it belongs to, moving an old one aside, cutting logs back to where a run resumes."""

import json
import os
from pathlib import Path

from duotone.data.refusal import Refused


def keep_rows_up_to(path: Path, images: int) -> None:
    """Drops the rows of a jsonl file that a resumed run will write again, and a last row that was cut off."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if row["images"] <= images:
            rows.append(line)
    draft = path.with_suffix(".draft")
    draft.write_text("".join(f"{row}\n" for row in rows))
    os.replace(draft, path)


def move_aside(folder: Path) -> Path | None:
    """Renames an earlier run's folder so that nothing of it is lost."""
    if not folder.exists():
        return None
    n = 1
    while (aside := folder.with_name(f"{folder.name}-before-{n}")).exists():
        n += 1
    os.replace(folder, aside)
    return aside


def stored_recipe(folder: Path) -> dict | None:
    """The recipe that a run's folder was begun with."""
    path = folder / "recipe.json"
    if not path.exists():
        if folder.exists() and any(folder.iterdir()):
            raise Refused(f"{folder} exists and is no run's folder (no recipe.json): give another --out")
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise Refused(f"{path} is not readable as JSON: restore it, or give another --out") from None


def write_json(path: Path, value: object) -> None:
    """Replaces a JSON file in one step."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(draft, path)
