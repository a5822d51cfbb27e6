"""A run's folder: which run it belongs to, which process uses it, moving it aside, cutting logs back on resuming."""

import fcntl
import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.whole_file import write_whole

CLAIM = ".claim"
DRAFT = re.compile(r"\..+\.[0-9a-f]{8}")


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Claims a run's folder for this process, however it ends; raises Refused if another process trains there.

    Two of them would remove each other's half-written checkpoints.
    """
    try:
        opened = open(folder / CLAIM, "a+")  # noqa: SIM115 - closed below
    except OSError as error:
        raise Refused(f"{folder} cannot be written to ({error.strerror}): give another --out") from None
    with opened as claim:
        try:
            fcntl.flock(claim, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            claim.seek(0)
            raise Refused(
                f"{folder} is in use by {claim.read().strip() or 'another process'}: wait until it ends, or give another --out"
            ) from None
        except OSError:  # a file system without locks: another process cannot be detected
            pass
        refuse_moved(folder, claim.fileno())
        claim.truncate(0)
        claim.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        claim.flush()
        remove_drafts(folder)
        yield


def refuse_moved(folder: Path, claim: int) -> None:
    """Raises Refused if another process moved the folder aside after the claim was opened and before it was locked."""
    try:
        still_there = os.path.samestat(os.fstat(claim), os.stat(folder / CLAIM))
    except FileNotFoundError:
        still_there = False
    if not still_there:
        raise Refused(f"{folder}: another process moved it aside while this one started; start it again")


def remove_drafts(folder: Path) -> None:
    """Removes the drafts, .NAME.1a2b3c4d, that a process left beside a run's files when it was killed while writing."""
    for path in (*folder.glob(".*"), *(folder / "previews").glob(".*")):
        if DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def keep_rows_up_to(path: Path, images: int) -> None:
    """Drops the rows of a jsonl file that a resumed run will write again, and rows that are cut off or not its own."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["images"] <= images:
                rows.append(line)
        except (ValueError, TypeError, KeyError):  # a row that was cut off, or that this package did not write
            continue
    write_whole(path, "".join(f"{row}\n" for row in rows))


def move_aside(folder: Path) -> Path | None:
    """Renames an earlier run's folder so that nothing of it is lost; raises Refused if another process trains there."""
    if not folder.exists():
        return None
    folder = Path(os.path.abspath(folder))  # "." has no name to rename by
    with claimed(folder):
        return renamed(folder)


def set_export_aside(folder: Path) -> Path | None:
    """Renames the export of an earlier end, if any: an ema.safetensors marks a run as complete and is its model."""
    export = folder / "ema.safetensors"
    return renamed(export, ending=".safetensors") if export.exists() else None


def renamed(path: Path, ending: str = "") -> Path:
    """Renames a folder or a file to the first free NAME-before-N; returns the new path."""
    n = 1
    while (aside := path.with_name(f"{path.name.removesuffix(ending)}-before-{n}{ending}")).exists():
        n += 1
    os.replace(path, aside)
    return aside


def refuse_foreign_folder(folder: Path) -> None:
    """Raises Refused on a folder that is not empty and not a run's."""
    if (folder / "recipe.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(path.name != CLAIM and not DRAFT.fullmatch(path.name) for path in folder.iterdir()):
        raise Refused(f"{folder} exists and is not a run's folder (no recipe.json): give another --out")


def made(folder: Path, flag: str = "--out") -> Path:
    """The folder that a flag names, made if it does not exist; raises Refused if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made ({error.strerror}): give another {flag}") from None
    if not os.access(folder, os.W_OK):
        raise Refused(f"{folder} cannot be written to: give another {flag}")
    return folder


def refuse_unwritable(folder: Path, flag: str) -> None:
    """Raises Refused if a folder could not be made or written to; makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Refused(f"{folder} cannot be written to, since {there} cannot: give another {flag}")


def stored_recipe(folder: Path) -> dict | None:
    """The stored recipe of a run's folder, or None if it has none."""
    refuse_foreign_folder(folder)
    path = folder / "recipe.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise Refused(f"{path} is not readable as JSON: restore it, or give another --out") from None


def held_out_keys(folder: Path) -> list[str]:
    """Keys of the samples held out from a run's training, from its splits.json."""
    path = folder / "splits.json"
    try:
        return list(json.loads(path.read_text())["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({type(error).__name__}): restore it, or remove it") from None
