"""CelebA or CelebA-HQ (a folder of images and the attribute list) -> shards with multi-hot attributes."""

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from duotone.data.prepare.picture_files import (
    Picture,
    PictureOptions,
    check_any_there,
    check_folder,
    key_of,
    read_text_file,
)
from duotone.data.refusal import Refused
from duotone.data.sample_text import split_lines

SPLITS = {"train": 0, "valid": 1, "test": 2}
VALUES = {"1": 1, "-1": 0, "0": 0}


@dataclass(frozen=True, kw_only=True)
class PrepareCeleba(PictureOptions):
    """Faces with attributes: list_attr_celeba.txt, its CSV form, or CelebAMask-HQ-attribute-anno.txt."""

    images: Path
    """Folder with the image files, such as img_align_celeba."""
    attributes: Path
    """The attribute list, .txt or .csv."""
    partition: Path | None = None
    """list_eval_partition, .txt or .csv; only needed with --split."""
    split: Literal["train", "valid", "test", "all"] = "all"
    """Which part to take."""

    def __post_init__(self):
        super().__post_init__()
        if self.split != "all" and self.partition is None:
            raise Refused(f"split is {self.split}: it needs --partition list_eval_partition.txt")
        if self.split == "all" and self.partition is not None:
            remedy = "add --split train (or valid, or test), or leave --partition out"
            raise Refused(f"partition is {self.partition} but split is all, which includes the test set: {remedy}")

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file or the line."""
        check_folder(self.images, "images")
        names, rows = read_attributes(self.attributes)
        wanted = rows if self.partition is None else self._of_split(list(rows))
        pictures = [self._picture(name, values) for name, values in rows.items() if name in wanted]
        check_any_there(pictures[: self.limit], self.images, self.attributes)
        about = {"made_by": "prepare celeba", "size": self.size, "split": self.split}
        return self.write(pictures, len(pictures), attributes=names, about=about)

    def _picture(self, name: str, values: list[int]) -> Picture:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Refused(f"{self.attributes}: the file name {name!r} leaves the image folder; correct it")
        return Picture(path=self.images / name, key=key_of(name.encode()), attributes=values, source=name)

    def _of_split(self, names: list[str]) -> set[str]:
        splits = read_partition(self.partition)
        without = [name for name in names if name not in splits]
        if without:
            found = f"it has no line for {len(without):,} pictures of {self.attributes}, the first {without[0]!r}"
            raise Refused(f"{self.partition}: {found}; download it again, or give the one that belongs to that list")
        wanted = {name for name in names if splits[name] == SPLITS[self.split]}
        if not wanted:
            found = f"no picture of {self.attributes} is in {self.split}"
            raise Refused(f"{self.partition}: {found}; choose another --split")
        return wanted


def read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Attribute names, and each file's values, 1 present or 0 absent; raises Refused naming the line."""
    lines, first, promised = _lines(path), 2, None
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():  # the text form starts with the number of images
        lines, first, promised = lines[1:], 3, lines[0][0]
    if len(lines) < 2:
        raise Refused(f"{path}: it is not an attribute list (names, then a line for each image); check the path")
    names = lines[0][1:] if _is_csv(path) else lines[0]  # the CSV form also names its first column
    _check_names(path, names, first - 1)
    rows = _rows(path, lines[1:], first, names)
    if promised not in (None, str(len(rows))):
        raise Refused(f"{path}: it says {promised[:20]} images but lists {len(rows)}; download it again")
    return names, rows


def _check_names(path: Path, names: list[str], number: int) -> None:
    """Raises Refused for a header that is a picture's line, names no attribute or names one twice."""
    if not names:
        remedy = "separate its columns by commas, the first for the file names" if _is_csv(path) else "write them there"
        raise Refused(f"{path}: line {number} names no attribute; {remedy}")
    wrong = next((name for name in names if name in VALUES or not name.strip()), None)
    if wrong is not None:
        found = f"line {number} has {wrong!r} where an attribute's name should be"
        raise Refused(f"{path}: {found}; begin the list with the line of names, as it was published")
    twice = next((name for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise Refused(f"{path}: line {number} names {twice!r} twice; remove or rename one of the two columns")


def _is_csv(path: Path) -> bool:
    return path.suffix.lower() == ".csv"


def _lines(path: Path) -> list[list[str]]:
    """The fields of every line."""
    lines = split_lines(read_text_file(path, "attributes"))
    try:
        return [*csv.reader(lines, skipinitialspace=True)] if _is_csv(path) else [line.split() for line in lines]
    except csv.Error as error:
        raise Refused(f"{path}: it is not a CSV file ({error}); check the path") from None


def _rows(path: Path, lines: list[list[str]], first: int, names: list[str]) -> dict[str, list[int]]:
    rows = {}
    for number, line in enumerate(lines, start=first):
        if not line:
            continue
        if len(line) != 1 + len(names) or any(value not in VALUES for value in line[1:]):
            raise Refused(f"{path}: line {number} is not a file name and {len(names)} values of 1 and -1; correct it")
        if line[0] in rows:
            raise Refused(f"{path}: line {number} names {line[0]!r} a second time; remove one of the two")
        rows[line[0]] = [VALUES[value] for value in line[1:]]
    return rows


def read_partition(path: Path) -> dict[str, int]:
    """The split of each file, as numbered in SPLITS; raises Refused naming the line."""
    splits = {}
    for number, line in enumerate(split_lines(read_text_file(path, "partition")), start=1):
        fields = line.replace(",", " ").split()
        if not fields or (number == 1 and fields[1:] == ["partition"]):  # the CSV form's header
            continue
        if len(fields) != 2 or fields[1] not in ("0", "1", "2"):
            raise Refused(f"{path}: line {number} is not a file name and 0, 1 or 2; give list_eval_partition")
        splits[fields[0]] = int(fields[1])
    return splits
