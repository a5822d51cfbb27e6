"""A checkpoint is a directory of named tensors, published at once as a whole; it holds no pickle and no world size.

    images-000000123000/  weight.safetensors  exp_avg.safetensors  exp_avg_sq.safetensors  ema.safetensors  manifest.json

Its ema.safetensors loads as a model, like the run's final one. A checkpoint is written under a temporary name, synced,
and renamed; resuming takes the newest one whose manifest verifies.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duotone.data.refusal import Refused, at_least
from duotone.data.whole_file import as_opened, sync

KINDS = ("weight", "exp_avg", "exp_avg_sq", "ema")
"""The kinds of a checkpoint whose manifest does not name them: those of AdamW."""
NAME = re.compile(r"images-\d{12}")


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """When checkpoints are written and how many are kept."""

    every: int = 256_000
    """Images between checkpoints; 0 = only at the end."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""
    stop_after: float = 0.0
    """Minutes after which the run stops with a checkpoint, from which the same command resumes, for queues with a time
    limit; 0 = never."""

    def check(self) -> None:
        at_least("checkpoint.every", self.every, 0)
        at_least("checkpoint.keep", self.keep, 1)
        at_least("checkpoint.stop_after", self.stop_after, 0)


def name_of(images: int) -> str:
    return f"images-{images:012d}"


def publish(
    folder: Path, images: int, tensors: dict[str, dict[str, Tensor]], facts: dict, header: dict[str, str] | None = None
) -> Path:
    """Writes a checkpoint whole or not at all; `facts` go into its manifest, `header` into the file of the EMA."""
    final = folder / name_of(images)
    draft = folder / f".{final.name}-{uuid.uuid4().hex[:8]}"
    try:
        draft.mkdir(parents=True)
        for kind, named in tensors.items():
            save_file(named, draft / f"{kind}.safetensors", header if kind == "ema" else None)
            as_opened(draft / f"{kind}.safetensors")
        files = {path.name: {"bytes": path.stat().st_size, "sha256": digest(path)} for path in sorted(draft.iterdir())}
        manifest = {"images": images, "kinds": list(tensors), **facts, "files": files}
        (draft / "manifest.json").write_text(json.dumps(manifest, indent=1))
        for path in [*draft.iterdir(), draft]:
            sync(path)
        if final.exists():
            shutil.rmtree(final)
        os.replace(draft, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise Refused(
            f"checkpoint {final} cannot be written ({error}): fix that, and the same command (without --fresh) resumes from the one before"
        ) from None
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    sync(folder)
    return final


def newest(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a line for each newer one that does not.

    Raises Refused if there are checkpoints but none verifies: starting over is for the user to decide.
    """
    passed_over = []
    for path in reversed(known(folder)):
        fault = verify(path)
        if fault is None:
            return path, passed_over
        passed_over.append(f"checkpoint {path} passed over: {fault}")
    if passed_over:
        raise Refused(
            f"{'; '.join(passed_over)}: put one back, or give --fresh, which moves the run aside and begins anew"
        )
    return None, []


def known(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first; anything else, such as a copy under another name, is the user's own."""
    return sorted(p for p in folder.glob("images-*") if NAME.fullmatch(p.name) and p.is_dir() and not p.is_symlink())


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None; raises Refused on an error of the disk, which does not mean damage."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, facts in manifest["files"].items():
            if (path / name).stat().st_size != facts["bytes"] or digest(path / name) != facts["sha256"]:
                return f"{name} differs from the manifest"
        missing = [kind for kind in manifest.get("kinds", KINDS) if f"{kind}.safetensors" not in manifest["files"]]
        if missing or name_of(manifest["images"]) != path.name:
            return f"manifest.json is not of {path.name}" if not missing else f"manifest.json has no {missing[0]}"
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json or a file it names cannot be used ({error})"
    except OSError as error:
        raise Refused(f"checkpoint {path} cannot be read ({error}): fix that, and the same command resumes") from None
    return None


def read(path: Path) -> tuple[dict, dict[str, dict[str, Tensor]]]:
    """The manifest and the named tensors of a checkpoint that verifies."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        return manifest, {kind: load_file(path / f"{kind}.safetensors") for kind in manifest.get("kinds", KINDS)}
    except (OSError, ValueError, SafetensorError) as error:
        raise Refused(f"checkpoint {path} cannot be read ({error}): remove it to resume from an older one") from None


def refuse_other_network(path: Path, stored: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raises Refused on a checkpoint whose tensors do not have this network's names and shapes."""
    for name in sorted(stored.keys() | shapes.keys()):
        there = tuple(stored[name].shape) if name in stored else None
        if there != shapes.get(name):
            raise Refused(
                f"checkpoint {path} is of another network: {name} is {there or 'absent'} there and {shapes.get(name) or 'absent'} "
                "here; start anew with --fresh or give another --out"
            )


def retire(folder: Path, keep: int, images: int) -> None:
    """Keeps the `keep` newest checkpoints up to that of `images`; removes older ones and what interrupted writes left.

    Later ones are damaged and were passed over: counting them would push out those that can be read.
    """
    earlier = [path for path in known(folder) if path.name <= name_of(images)]
    for path in earlier[:-keep]:
        shutil.rmtree(path)
    for path in folder.glob(".images-*"):
        shutil.rmtree(path)


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
