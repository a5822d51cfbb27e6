"""A folder of pictures -> shards: one class per sub-folder, captions from .txt files or from the class."""

import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from duotone.data.prepare.picture_files import (
    SUFFIXES,
    Picture,
    PictureOptions,
    check_folder,
    class_caption,
    key_of,
    read_text_file,
)
from duotone.data.refusal import Refused
from duotone.data.sample_text import split_lines

# Picture formats that are not read. If they were ignored like stray text files, whole classes could be missing.
FOREIGN = {".gif", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jxl", ".jp2", ".j2k"}
FOREIGN |= {".tga", ".ico", ".svg", ".psd", ".ppm", ".pgm", ".pbm", ".pnm"}
FOREIGN |= {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}


class CaptionUnused(UserWarning):
    """Files that look like captions but have no picture of the same name beside them."""


@dataclass(frozen=True, kw_only=True)
class PrepareFolder(PictureOptions):
    """Your own pictures: JPEG, PNG and WebP files, with or without sub-folders."""

    images: Positional[Path]
    """The folder; sub-folders may be nested."""
    classes: Literal["folders", "none"] = "folders"
    """folders: each sub-folder that holds pictures is a class; none: sub-folders mean nothing."""
    caption: str = "a photo of a {}"
    """Caption of a picture without a .txt beside it, with {} for its class. Empty: no caption from the class."""

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file."""
        check_folder(self.images, "images")
        unread = None if self.on_bad == "refuse" else []
        paths, listed, others = _files_below(self.images, unread)
        if not paths:
            found = f", but {_listed(_by_extension(others))}" if others else ""
            remedy = "check the path, or convert pictures of other formats" if others else "check the path"
            raise Refused(f"{self.images}: it holds no {', '.join(sorted(SUFFIXES))} files{found}; {remedy}")
        foreign = [path for path in others if path.suffix.lower() in FOREIGN]
        self._refuse_foreign(foreign)
        folders = sorted({path.parent for path in paths}, key=_natural) if self.classes == "folders" else []
        names = self._class_names(paths, folders)
        labels = {name: label for label, name in enumerate(names or [])}
        texts = _by_name(listed)
        pictures = [self._picture(path, texts, labels) for path in paths]
        self._check_captions(pictures, texts)
        unused = _unused(listed, {texts.get(path.with_suffix("")) for path in paths})
        counted = _by_extension(path for path in others if path.suffix.lower() not in FOREIGN)
        about = {"made_by": "prepare folder", "other_files": counted}
        summary = self.write(pictures, len(pictures), classes=names, about=about)
        skipped = [*(unread or []), *(f"{path}: {path.suffix} is not read" for path in foreign), *summary["skipped"]]
        return summary | {"other_files": counted, "captions_of_no_picture": len(unused), "skipped": skipped}

    def _refuse_foreign(self, foreign: list[Path]) -> None:
        if foreign and self.on_bad == "refuse":
            found = f"{foreign[0].suffix} is not read (in all: {_listed(_by_extension(foreign))})"
            remedy = "convert to .png or .jpg, or pass --on-bad skip to leave such pictures out"
            raise Refused(f"{foreign[0]}: {found}; {remedy}")

    def _class_names(self, paths: list[Path], folders: list[Path]) -> list[str] | None:
        if not folders or folders == [self.images]:
            return None
        if self.images in folders:
            stray = next(path for path in paths if path.parent == self.images)
            raise Refused(f"{stray}: it lies beside the class folders; move it into one, or pass --classes none")
        names = [_printable(folder.relative_to(self.images)) for folder in folders]
        twice = next((name for name, count in Counter(names).items() if count > 1), None)
        if twice is not None:
            raise Refused(f"{self.images}: two folders are both read as {twice!r}; give them UTF-8 names that differ")
        return names

    def _picture(self, path: Path, texts: dict[Path, Path], labels: dict[str, int]) -> Picture:
        within = path.relative_to(self.images)
        name = _printable(within.parent)
        return Picture(
            path=path,
            key=key_of(os.fsencode(within.as_posix())),
            captions=self._captions(texts.get(path.with_suffix("")), name if labels else None),
            label=labels.get(name),
            source=_printable(within),
        )

    def _captions(self, beside: Path | None, name: str | None) -> list[str]:
        lines = split_lines(read_text_file(beside, "caption")) if beside else []
        captions = [line.strip() for line in lines if line.strip()]
        return captions or ([class_caption(self.caption, name)] if name and self.caption else [])

    def _check_captions(self, pictures: list[Picture], texts: dict[Path, Path]) -> None:
        captioned = sum(bool(picture.captions) for picture in pictures)
        if 0 < captioned < len(pictures):
            bare = next(picture for picture in pictures if not picture.captions)
            beside = texts.get(bare.path.with_suffix(""))
            if beside:
                raise Refused(
                    f"{beside}: it is empty, but other pictures have captions; write one, or remove the others"
                )
            raise Refused(f"{bare.path}: it has no .txt beside it but other pictures do; add one, or remove the others")


def _files_below(folder: Path, unread: list[str] | None) -> tuple[list[Path], list[Path], list[Path]]:
    """Pictures, texts and all other files, each in natural order, without hidden files.

    Folders that cannot be read are added to `unread`; if it is None, Refused is raised.
    """

    def fail(error: OSError) -> None:
        reason = f"{error.filename}: it cannot be read ({error.strerror})"
        if unread is None:
            raise Refused(f"{reason}; check its permissions, or pass --on-bad skip to leave such folders out")
        unread.append(reason)

    paths, texts, others, walked = [], [], [], {}
    for root, folders, files in os.walk(folder, onerror=fail, followlinks=True):
        _refuse_duplicate_folder(Path(root), walked)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for path in (Path(root, name) for name in files if not name.startswith(".")):
            if path.suffix.lower() in SUFFIXES:
                paths.append(path)
            else:
                (texts if path.suffix.lower() == ".txt" else others).append(path)
    return sorted(paths, key=_natural), sorted(texts, key=_natural), sorted(others, key=_natural)


def _by_name(texts: list[Path]) -> dict[Path, Path]:
    """Caption files by their path without .txt; if there are two, the one with a lower-case ending wins."""
    last = sorted(texts, key=lambda text: text.suffix == ".txt")
    return {text.with_suffix(""): text for text in last if text.is_file()}


def _unused(texts: list[Path], used: set[Path | None]) -> list[Path]:
    """Caption files without a picture; a warning names the first, because its caption would be lost silently."""
    unused = [text for text in texts if text not in used]
    if unused:
        found = f"{len(unused):,} .txt files have no picture of the same name beside them, the first {str(unused[0])!r}"
        warnings.warn(f"{found}: the caption of a.jpg is a.txt", CaptionUnused, stacklevel=2)
    return unused


def _by_extension(paths: Iterable[Path]) -> dict[str, int]:
    """The number of files with each extension."""
    extensions = (_printable(Path(path.suffix)) if path.suffix else "without extension" for path in paths)
    return dict(sorted(Counter(extensions).items()))


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {extension}" for extension, count in counts.items())


def _refuse_duplicate_folder(folder: Path, walked: dict[Path, Path]) -> None:
    """Raises Refused for a link to a folder that is also read by another path, or that closes a circle.

    `walked` maps each resolved folder to the path by which it was read.
    """
    other = walked.setdefault(folder.resolve(), folder)
    if other is not folder:
        link, other = (folder, other) if folder.is_symlink() else (other, folder)
        raise Refused(f"{link}: it is a link to a folder that is read as {other} too; remove the link")


def _printable(path: Path) -> str:
    """A path as text that JSON can hold, even if the file system's bytes are not UTF-8."""
    return os.fsencode(path.as_posix()).decode("utf-8", "replace")


def _natural(path: Path) -> tuple:
    """A sort key that puts "9" before "10": digits compare as numbers, and folders come before the names in them."""
    return [[_place(part) for part in re.split(r"(\d+)", name) if part] for name in path.parts], str(path)


def _place(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdecimal() else (1, 0, part.lower())
