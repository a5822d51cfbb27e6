"""dataset.json: what a folder's shards held when they were written; a folder without one is read as it is."""

import json
from dataclasses import dataclass
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.tar_index import TarIndex
from duotone.data.whole_file import write_whole

NAME = "dataset.json"
FORMAT = "duotone-shards"


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Names of classes and attributes, and every shard with its fingerprint."""

    path: Path
    count: int = 0
    classes: list[str] | None = None
    attributes: list[str] | None = None
    shards: dict[str, str] | None = None  # file name -> fingerprint; None if the folder has no dataset.json
    about: dict | None = None
    note: str | None = None

    def save(self) -> None:
        """Writes the file, whole or not at all."""
        write_whole(self.path, json.dumps(self.content(), indent=1, ensure_ascii=False) + "\n")

    def content(self) -> dict:
        """The fields of the file."""
        content = {"format": FORMAT, "version": 1, "count": self.count, "classes": self.classes}
        return content | {"attributes": self.attributes, "about": self.about or {}, "shards": self.shards}

    def check(self, paths: list[Path], indexes: list[TarIndex]) -> None:
        """Raises Refused if a shard's content is not what was written."""
        for path, index in zip(paths, indexes):
            if self.shards is not None and self.shards[path.name] != index.fingerprint:
                raise Refused(f"{path}: its content is not what {NAME} says; copy the shard again, or delete {NAME}")


def read_manifest(folder: Path, paths: list[Path]) -> Manifest:
    """The folder's manifest; raises Refused if it is damaged or its list of shards does not match the files."""
    path = folder / NAME
    if not path.is_file():
        return Manifest(path=path)
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        raise _damaged(path) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        return Manifest(path=path, note=f"{path} was not written by duotone and is not used")
    classes, attributes, shards = (content.get(name) for name in ("classes", "attributes", "shards"))
    if not (_names(classes) and _names(attributes) and isinstance(shards, dict)):
        raise _damaged(path)
    _check_names(folder, set(shards), {shard.name for shard in paths})
    return Manifest(path=path, classes=classes, attributes=attributes, shards=shards)


def _names(value) -> bool:
    return value is None or isinstance(value, list) and all(isinstance(name, str) for name in value)


def _damaged(path: Path) -> Refused:
    return Refused(f"{path}: it is damaged; run `duotone prepare` again, or delete it")


def _check_names(folder: Path, named: set[str], present: set[str]) -> None:
    missing, added = sorted(named - present), sorted(present - named)
    if missing:
        raise Refused(f"{folder}: {missing[0]} is missing, although {NAME} names it; copy the folder again")
    if added:
        raise Refused(f"{folder}: {added[0]} is not named in {NAME}; move it away, or delete {NAME}")
