"""CelebA or CelebA-HQ (a folder of images and the attribute list) -> shards with multi-hot attributes."""

import csv
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from duotone.data.prepare.picture_files import Picture, PictureOptions, check_folder, key_of, read_text_file
from duotone.data.refusal import Refused

SPLITS = {"train": 0, "valid": 1, "test": 2}
VALUES = {"1": 1, "-1": 0, "0": 0}


@dataclass(frozen=True, kw_only=True)
class PrepareCeleba(PictureOptions):
    """Faces with attributes: list_attr_celeba.txt, its CSV form, or CelebAMask-HQ-attribute-anno.txt."""

    images: Path
    """Folder of the image files, such as img_align_celeba."""
    attributes: Path
    """The attribute list, .txt or .csv."""
    partition: Path | None = None
    """list_eval_partition, .txt or .csv; only needed for a split."""
    split: Literal["train", "valid", "test", "all"] = "all"
    """Which part to take."""

    def __post_init__(self):
        super().__post_init__()
        if self.split != "all" and self.partition is None:
            raise Refused(f"split is {self.split}: it needs --partition list_eval_partition.txt")

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file or the line."""
        check_folder(self.images, "images")
        names, rows = read_attributes(self.attributes)
        wanted = self._wanted()
        pictures = [self._picture(name, values) for name, values in rows.items() if wanted is None or name in wanted]
        about = {"made_by": "prepare celeba", "size": self.size, "split": self.split}
        return self.write(pictures, len(pictures), attributes=names, about=about)

    def _picture(self, name: str, values: list[int]) -> Picture:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise Refused(f"{self.attributes}: the file name {name!r} leaves the image folder; correct it")
        return Picture(path=self.images / name, key=key_of(name.encode()), attributes=values, source=name)

    def _wanted(self) -> set[str] | None:
        if self.split == "all":
            return None
        lines = [line.replace(",", " ").split() for line in read_text_file(self.partition, "partition").splitlines()]
        return {line[0] for line in lines if len(line) == 2 and line[1] == str(SPLITS[self.split])}


def read_attributes(path: Path) -> tuple[list[str], dict[str, list[int]]]:
    """Attribute names, and for each file 1 present or 0 absent; raises Refused naming the line."""
    text = read_text_file(path, "attributes")
    try:
        lines = list(csv.reader(text.splitlines())) if path.suffix == ".csv" else [*map(str.split, text.splitlines())]
    except csv.Error as error:
        raise Refused(f"{path}: it is not a CSV file ({error}); check the path") from None
    first = 2
    if lines and len(lines[0]) == 1 and lines[0][0].isdecimal():  # the text form begins with the number of images
        lines, first = lines[1:], 3
    if len(lines) < 2:
        raise Refused(f"{path}: it is not an attribute list (names, then a line for each image); check the path")
    names = lines[0][1:] if path.suffix == ".csv" else lines[0]  # the CSV form names its first column too
    rows = {}
    for number, line in enumerate(lines[1:], start=first):
        if not line:
            continue
        if len(line) != 1 + len(names) or any(value not in VALUES for value in line[1:]):
            raise Refused(f"{path}: line {number} is not a file name and {len(names)} values of 1 and -1; correct it")
        rows[line[0]] = [VALUES[value] for value in line[1:]]
    return names, rows
