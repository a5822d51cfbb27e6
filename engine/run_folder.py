"""The folder of a run: which run it belongs to, one process at a time, moving an old one aside, cutting logs back to where a run resumes."""

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
    """Holds a run's folder for this process, however it ends; raises Refused where another one trains there.

    Two of them would remove each other's checkpoints in the making.
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
        except OSError:  # a file system without locks: nothing can be said
            pass
        refuse_moved(folder, claim.fileno())
        claim.truncate(0)
        claim.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        claim.flush()
        remove_drafts(folder)
        yield


def refuse_moved(folder: Path, claim: int) -> None:
    """Raises Refused where another process moved the folder aside between the opening of its claim and the lock on it."""
    try:
        still_there = os.path.samestat(os.fstat(claim), os.stat(folder / CLAIM))
    except FileNotFoundError:
        still_there = False
    if not still_there:
        raise Refused(f"{folder}: another process moved it aside while this one started; start it again")


def remove_drafts(folder: Path) -> None:
    """What a process that was killed while it wrote has left beside the files of a run: .NAME.1a2b3c4d."""
    for path in (*folder.glob(".*"), *(folder / "previews").glob(".*")):
        if DRAFT.fullmatch(path.name) and path.is_file():
            path.unlink(missing_ok=True)


def keep_rows_up_to(path: Path, images: int) -> None:
    """Drops the rows of a jsonl file that a resumed run will write again, and a last row that was cut off."""
    if not path.exists():
        return
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["images"] <= images:
                rows.append(line)
        except (ValueError, TypeError, KeyError):  # a row that was cut off, or that nobody here wrote
            continue
    write_whole(path, "".join(f"{row}\n" for row in rows))


def move_aside(folder: Path) -> Path | None:
    """Renames an earlier run's folder so that nothing of it is lost; raises Refused where another process trains there."""
    if not folder.exists():
        return None
    folder = Path(os.path.abspath(folder))  # the name of "." is its own
    with claimed(folder):
        return renamed(folder)


def reopen(folder: Path) -> Path | None:
    """Renames the export of an earlier end: by ema.safetensors a run is known to be complete, and its model is found."""
    export = folder / "ema.safetensors"
    return renamed(export, ending=".safetensors") if export.exists() else None


def renamed(path: Path, ending: str = "") -> Path:
    """Gives a folder or a file a name that nothing has yet."""
    n = 1
    while (aside := path.with_name(f"{path.name.removesuffix(ending)}-before-{n}{ending}")).exists():
        n += 1
    os.replace(path, aside)
    return aside


def refuse_strangers(folder: Path) -> None:
    """Raises Refused on a folder that holds something and is no run's."""
    if (folder / "recipe.json").exists() or not folder.exists():
        return
    if not folder.is_dir() or any(path.name != CLAIM and not DRAFT.fullmatch(path.name) for path in folder.iterdir()):
        raise Refused(f"{folder} exists and is no run's folder (no recipe.json): give another --out")


def made(folder: Path, flag: str = "--out") -> Path:
    """The folder that a flag names, made where it is not there; raises Refused where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Refused(f"{folder} cannot be made ({error.strerror}): give another {flag}") from None
    if not os.access(folder, os.W_OK):
        raise Refused(f"{folder} cannot be written to: give another {flag}")
    return folder


def refuse_unwritable(folder: Path, flag: str) -> None:
    """Raises Refused where a folder could not be made or written to, and makes nothing."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise Refused(f"{folder} cannot be written to, since {there} cannot: give another {flag}")


def stored_recipe(folder: Path) -> dict | None:
    """The recipe that a run's folder was begun with."""
    refuse_strangers(folder)
    path = folder / "recipe.json"
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError:
        raise Refused(f"{path} is not readable as JSON: restore it, or give another --out") from None


def held_out_keys(folder: Path) -> list[str]:
    """Keys of the samples that a run was not trained on, as its splits.json names them."""
    path = folder / "splits.json"
    try:
        return list(json.loads(path.read_text())["held_out"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(f"{path} cannot be read ({type(error).__name__}): restore it, or remove it") from None
