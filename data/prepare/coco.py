"""COCO captions (annotations JSON and a folder of images) -> shards; every caption of an image is kept."""

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from duotone.data.prepare.picture_files import Picture, PictureOptions, check_any_there, check_folder, read_text_file
from duotone.data.refusal import Refused


@dataclass(frozen=True, kw_only=True)
class PrepareCoco(PictureOptions):
    """Images with captions in COCO's format, such as captions_train2017.json and train2017/."""

    images: Path
    """Folder with the image files."""
    annotations: Path
    """The captions, a JSON file with `images` and `annotations`."""

    def run(self) -> dict:
        """Writes the shards and returns a summary; raises Refused naming the file or the image id."""
        check_folder(self.images, "images")
        content = _read(self.annotations)
        captions = _captions_by_image(self.annotations, content["annotations"])
        pictures, bare = self._pictures(content["images"], captions)
        check_any_there(pictures[: self.limit], self.images, self.annotations)
        summary = self.write(pictures, len(pictures), about={"made_by": "prepare coco", "size": self.size})
        skipped = [f"{picture.path}: it has no caption" for picture in bare] + summary["skipped"]
        listed = {int(picture.key) for picture in (*pictures, *bare)}
        unlisted = sum(len(said) for number, said in captions.items() if number not in listed)
        return summary | {"skipped": skipped, "captions_of_no_image": unlisted}

    def _pictures(self, images: list, captions: dict[int, list[str]]) -> tuple[list[Picture], list[Picture]]:
        """The pictures with captions, sorted by file name, and those without."""
        pictures = [self._picture(entry, captions) for entry in images]
        _refuse_duplicate_image(self.annotations, pictures)
        bare = [picture for picture in pictures if not picture.captions]
        if bare and self.on_bad == "refuse":
            remedy = "add one, or pass --on-bad skip to leave such images out"
            raise Refused(f"{self.annotations}: {bare[0].source} has no caption; {remedy}")
        return sorted((p for p in pictures if p.captions), key=lambda picture: picture.source), bare

    def _picture(self, entry: dict, captions: dict[int, list[str]]) -> Picture:
        try:
            number, name = _id(self.annotations, entry["id"]), PurePosixPath(str(entry["file_name"]))
        except (KeyError, TypeError, ValueError):
            raise Refused(f"{self.annotations}: an image without id or file_name; check the file") from None
        if name.is_absolute() or ".." in name.parts:
            raise Refused(f"{self.annotations}: file_name {str(name)!r} leaves the image folder; correct it")
        return Picture(
            path=self.images / name, key=f"{number:012d}", captions=captions.get(number, []), source=str(name)
        )


def _read(path: Path) -> dict:
    try:
        content = json.loads(read_text_file(path, "annotations"))
        if isinstance(content["images"], list) and isinstance(content["annotations"], list):
            return content
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise Refused(
        f"{path}: it is not a COCO captions file (JSON with lists `images` and `annotations`); check the path"
    )


def _refuse_duplicate_image(path: Path, pictures: list[Picture]) -> None:
    """Raises Refused for an image that is listed twice, by its id or by its file."""
    ids: dict[str, str] = {}
    files: dict[str, str] = {}
    for key, name in ((picture.key, picture.source) for picture in pictures):
        if key in ids:
            raise Refused(f"{path}: `images` lists id {int(key)} twice ({ids[key]!r}, {name!r}); remove one of the two")
        if name in files:
            raise Refused(f"{path}: `images` lists {name!r} twice (ids {int(files[name])}, {int(key)}); remove one")
        ids[key], files[name] = name, key


def _id(path: Path, value) -> int:
    """An id as an int; raises Refused for a fraction, which int() would turn into another id, and ValueError."""
    if isinstance(value, float) and not value.is_integer():
        raise Refused(f"{path}: an image's id is {value}, which is not a whole number; correct it")
    return int(value)


def _captions_by_image(path: Path, annotations: list) -> dict[int, list[str]]:
    captions: dict[int, list[str]] = {}
    for annotation in annotations:
        try:
            number, caption = _id(path, annotation["image_id"]), " ".join(annotation["caption"].split())
        except (KeyError, TypeError, ValueError, AttributeError):
            raise Refused(f"{path}: an annotation without image_id or caption; use the captions file") from None
        if caption:
            captions.setdefault(number, []).append(caption)
    return captions
