"""Writes files that replace the old ones in one step: no reader finds half a file, not even after a crash."""

import errno
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """A path beside the file; what the block writes there replaces the file, or is deleted after an error."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        yield draft
        sync(draft)
        os.replace(draft, path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def as_opened(path: Path) -> None:
    """Gives a file that a library made readable for its owner alone the permissions that open() would give it."""
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
OF_THE_DISK |= {errno.ENAMETOOLONG, errno.EISDIR, errno.ENOTDIR, errno.EIO, errno.ESTALE}


def file_system_message(error: Exception) -> str | None:
    """A file system's error message for a file it cannot write or read, in one line; None for any other error."""
    code = getattr(error, "errno", None)
    inside = re.search(r"Os \{ code: (\d+)|\(os error (\d+)\)", str(error))  # old and new format of safetensors
    if code not in OF_THE_DISK and (inside is None or int(inside[1] or inside[2]) not in OF_THE_DISK):
        return None
    return f"{' '.join(str(error).split())}: make room, or give a path that can be used"


def write_whole(path: Path, text: str) -> None:
    """Replaces a text file, UTF-8."""
    with draft_of(path) as draft:
        draft.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Replaces a JSON file."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def sync(path: Path) -> None:
    """Returns once a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
