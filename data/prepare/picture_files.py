"""Picture files -> samples: checked and shrunk on a few threads, in order; shared by every `prepare` of such files."""

import hashlib
import io
import os
import stat
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image
from tqdm import tqdm

from duotone.data.framing import upright
from duotone.data.image_header import MAX_BYTES, ImageHeader, Unreadable, read_header
from duotone.data.pillow import FORMATS, opaque
from duotone.data.refusal import Refused, first_line
from duotone.data.write_shards import ImageFormat, Sample, encode_image, readable_texts, write_shards

EXTENSIONS = {"jpeg": "jpg", "png": "png", "webp": "webp"}
SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp"}
UNPACK = {".tar.gz": "tar xzf", ".tgz": "tar xzf", ".tar": "tar xf", ".zip": "unzip", ".7z": "7z x"}
REMEDY = "repair or remove it, or pass --on-bad skip to leave such pictures out"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A picture file with its captions, label and attributes."""

    path: Path
    key: str | None = None
    captions: list[str] = field(default_factory=list)
    label: int | None = None
    attributes: list[int] | None = None
    source: str | None = None


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How picture files become shards."""

    out: Path
    """Folder to write; it must not exist."""
    size: int | None = None
    """Shrink until the short side has this many pixels; without it the files are stored as they are."""
    image_format: ImageFormat | None = None
    """Format of shrunk pictures: jpg (the default), png, or npy (decoded: larger, but read many times faster)."""
    quality: int | None = None
    """JPEG quality of shrunk pictures, 1 to 100; by default 95."""
    per_shard: int = 4096
    """Samples per shard."""
    limit: int | None = None
    """Take only the first `limit` pictures."""
    on_bad: Literal["refuse", "skip"] = "refuse"
    """If a picture cannot be read: stop and name it, or leave it out and count it."""
    threads: int = 2
    """Pictures read at the same time."""

    def __post_init__(self):
        for name in ("size", "per_shard", "limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise Refused(f"{name} is {value}: use 1 or more")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise Refused(f"quality is {self.quality}: use 1 to 100")
        for name in ("image_format", "quality"):
            value = getattr(self, name)
            if value is not None and self.size is None:
                raise Refused(f"{name} is {value}, but without size the files are stored as they are: give size too")

    def write(self, pictures: Iterable[Picture], total: int, **named) -> dict:
        """Writes the pictures as shards and returns a summary: images, skipped, shards, out."""
        total = min(total, self.limit or total)
        skipped: list[str] = []
        samples = self._samples(islice(pictures, self.limit), skipped)
        progress = tqdm(samples, total=total, desc=f"writing {self.out}", unit="image", disable=None)
        content = write_shards(progress, self.out, per_shard=self.per_shard, **named)
        summary = {"out": str(self.out), "images": content["count"], "shards": len(content["shards"])}
        return summary | {"classes": content["classes"], "attributes": content["attributes"], "skipped": skipped}

    def _samples(self, pictures: Iterable[Picture], skipped: list[str]) -> Iterator[Sample]:
        for picture, read in in_order(self._sample, pictures, self.threads):
            try:
                yield read.result()
            except Unreadable as reason:
                if self.on_bad == "refuse":
                    raise Refused(f"{picture.path}: {reason}; {REMEDY}") from None
                skipped.append(f"{picture.path}: {reason}")

    def _sample(self, picture: Picture) -> Sample:
        """The picture as it will be stored; raises Unreadable if it cannot be read, now or in training."""
        image, extension = read_picture(picture.path, self.size)
        if extension is None:
            image, extension = self._encoded(image)
        sample = Sample(
            image=image,
            extension=extension,
            key=picture.key,
            captions=picture.captions,
            label=picture.label,
            attributes=picture.attributes,
            source=picture.source,
        )
        readable_texts(sample)
        return sample

    def _encoded(self, image_HWC: np.ndarray) -> tuple[bytes, str]:
        extension = self.image_format or "jpg"
        try:
            image = encode_image(image_HWC, extension, self.quality or 95)
        except (OSError, ValueError) as error:  # such as a side longer than the format allows
            raise Unreadable(f"it cannot be stored as {extension} ({error})") from None
        if len(image) > MAX_BYTES:
            smaller = "a smaller --size" + (", or --image-format jpg," if extension != "jpg" else "")
            raise Unreadable(f"stored as {extension} its {len(image)} bytes exceed {MAX_BYTES} ({smaller} takes fewer)")
        return image, extension


def key_of(source: bytes) -> str:
    """A key made from a picture's name alone, so that adding other pictures does not change which are held out."""
    return hashlib.blake2b(source, digest_size=8).hexdigest()


def in_order(work: Callable, items: Iterable, threads: int) -> Iterator[tuple[object, Future]]:
    """Each item with the Future of its work, in the order of the items, a few of them in progress at a time."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(work, item)))
                if len(waiting) > 4 * threads:
                    yield waiting.popleft()
            while waiting:
                yield waiting.popleft()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def read_picture(path: Path, size: int | None) -> tuple[np.ndarray | bytes, str | None]:
    """The picture shrunk to uint8 (H, W, C), or with size None its bytes and extension; raises Unreadable."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe could block for ever
            raise Unreadable("it is not a file")
        if status.st_size > MAX_BYTES:
            raise Unreadable(f"its {status.st_size} bytes exceed {MAX_BYTES}")
        encoded = path.read_bytes()
    except (OSError, ValueError) as error:
        raise Unreadable(f"it cannot be read ({getattr(error, 'strerror', error)})") from None
    header = read_header(encoded)
    if header.kind not in EXTENSIONS:
        raise Unreadable("it is neither JPEG, PNG nor WebP")
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as image:
            return _kept(image, encoded, header) if size is None else (_shrunk(image, size, header.orientation), None)
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, OverflowError) as error:
        raise Unreadable(first_line(error)) from None


def _kept(image: Image.Image, encoded: bytes, header: ImageHeader) -> tuple[bytes, str]:
    image.draft("RGB", (1, 1))  # an eighth of each side is enough to see whether all bytes decode
    image.load()
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        stream = io.BytesIO()
        _upright(opaque(image), header.orientation).save(stream, "PNG")
        if stream.tell() > MAX_BYTES:
            found = f"without its transparency it is a PNG whose {stream.tell()} bytes exceed {MAX_BYTES}"
            raise Unreadable(f"{found} (--size stores it smaller)")
        return stream.getvalue(), "png"
    return encoded, EXTENSIONS[header.kind]


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    """Turned upright by the orientation that training reads too: Pillow's own reader looks in more places."""
    return Image.fromarray(upright(np.asarray(image), orientation))


def _shrunk(image: Image.Image, size: int, orientation: int) -> np.ndarray:
    # JPEG can decode at 1/2, 1/4 or 1/8 size; two pixels per wanted one leave the filter enough to work with.
    image.draft("RGB", (2 * size, 2 * size))
    image = _upright(opaque(image), orientation)
    shrink = min(image.size) / size
    if shrink > 1:
        sides = [max(size, round(side / shrink)) for side in image.size]
        image = image.resize(sides, Image.Resampling.LANCZOS)
    image_HWC = np.asarray(image)
    return image_HWC[:, :, None] if image_HWC.ndim == 2 else image_HWC


def class_caption(template: str, name: str) -> str:
    """The template with a class for {}: only its last folder, spaces for underscores, "an" before a vowel."""
    words = name.rpartition("/")[2].replace("_", " ")
    if words[:1].lower() in list("aeiou"):
        template = template.replace(" a {}", " an {}")
    return template.replace("{}", words)


def check_folder(folder: Path, flag: str) -> None:
    """Raises Refused if the folder does not exist or is still an archive; `flag` names it in the message."""
    if folder.is_dir():
        return
    if not folder.is_file():
        raise Refused(f"{flag} {folder}: there is no such folder; check the path")
    command = next((command for ending, command in UNPACK.items() if folder.name.lower().endswith(ending)), None)
    remedy = f"unpack it (`{command} {folder}`) and give the folder" if command else "give the folder"
    raise Refused(f"{flag} {folder}: it is a file; {remedy}")


def check_any_there(pictures: list[Picture], folder: Path, listed_in: Path) -> None:
    """Raises Refused if not one listed picture is in the folder, which then is another list's or at the wrong level."""
    if not pictures or any(os.path.lexists(picture.path) for picture in pictures):
        return
    first = pictures[0].path.relative_to(folder)
    inside = _names_in(folder)
    below = next((folder / name for name in inside if os.path.lexists(folder / name / first)), None)
    if below is not None:
        found = f"the pictures that {listed_in} names are one folder below"
        raise Refused(f"images {folder}: {found}; pass --images {below}")
    holds = f"{inside[0]!r} and {len(inside) - 1:,} more" if inside else "nothing"
    found = f"it holds {holds}, and not one picture that {listed_in} names, the first {str(first)!r}"
    raise Refused(f"images {folder}: {found}; give the folder of exactly these pictures, named as listed")


def _names_in(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except OSError as error:
        raise Refused(f"images {folder}: it cannot be read ({error.strerror}); check its permissions") from None


def read_text_file(path: Path, flag: str) -> str:
    """A text file's content; raises Refused if it cannot be read or is not UTF-8."""
    try:
        return path.read_text("utf-8-sig")
    except OSError as error:
        raise Refused(f"{flag} {path}: it cannot be read ({error.strerror}); check the path") from None
    except UnicodeDecodeError:
        raise Refused(f"{flag} {path}: it is not UTF-8 text; check that it is the right file") from None
