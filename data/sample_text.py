"""A sample's .txt and .json members: captions, label, attributes.

Captions come from the JSON's list `captions`, else the .txt (one caption per line), else the JSON's `caption`.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field

MAX_BYTES = 1 << 20  # of one text member


@dataclass(frozen=True, slots=True)
class SampleText:
    """Captions, label and attributes of one image; label is -1 and attributes is None if absent."""

    captions: list[str] = field(default_factory=list)
    label: int = -1
    attributes: list[int] | None = None  # each 1 present, 0 absent, -1 unknown


def read_text(member: Callable[[str], bytes | None]) -> SampleText:
    """A sample's text; `member` returns the bytes of its "txt" or "json"; raises ValueError with the reason."""
    raw_json = member("json")
    fields = _object(raw_json) if raw_json else {}
    listed = fields.get("captions")
    captions = _captions(listed) if isinstance(listed, list) else []
    captions = captions or _lines(member("txt")) or _captions([fields.get("caption")])
    return SampleText(captions, _label(fields.get("label")), _attributes(fields.get("attributes")))


def split_lines(text: str) -> list[str]:
    """The lines of a text, split only at CR, LF or both."""
    lines = re.split("\r\n|\r|\n", text)  # str.splitlines also splits at U+2028, U+0085 and others, found in captions
    return lines if lines[-1] else lines[:-1]


def _lines(txt: bytes | None) -> list[str]:
    return _captions(split_lines(_decoded(txt, "txt"))) if txt else []


def _decoded(raw: bytes, extension: str) -> str:
    if len(raw) > MAX_BYTES:
        raise ValueError(f"its .{extension} of {len(raw)} bytes exceeds {MAX_BYTES}")
    if b"\0" in raw:
        raise ValueError(f"its .{extension} holds zero bytes: it is damaged")
    try:
        return raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError:
        raise ValueError(f"its .{extension} is not UTF-8") from None


def _captions(lines: list) -> list[str]:
    return [_encodable(line.strip()) for line in lines if isinstance(line, str) and line.strip()]


def _encodable(caption: str) -> str:
    if not caption.isascii() and any("\ud800" <= letter <= "\udfff" for letter in caption):
        raise ValueError("a caption holds half a surrogate pair")
    return caption


def _object(raw: bytes) -> dict:
    text = _decoded(raw, "json")
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("its .json is not valid JSON") from None
    if not isinstance(fields, dict):
        raise ValueError("its .json is not an object")
    return fields


def _label(value) -> int:
    if value is None:
        return -1
    if type(value) is not int or not 0 <= value < 2**31:
        raise ValueError(f"its label {str(value)[:40]!r} is not a class index (0, 1, 2, ...)")
    return value


def _attributes(value) -> list[int] | None:
    if value is None:
        return None
    if not isinstance(value, list) or any(type(one) is not int or one not in (-1, 0, 1) for one in value):
        raise ValueError("its attributes are not a list of 1 (present), 0 (absent) and -1 (unknown)")
    return value
