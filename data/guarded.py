"""The bytes of samples in mapped shards, given out only if they match the index."""

import zlib
from pathlib import Path

import numpy as np

from duotone.data.sample_text import SampleText, read_text
from duotone.data.tar_index import allow_open, map_bytes


class BadSample(Exception):
    """A sample that cannot be used, and the reason."""

    def __init__(self, sample: int, reason: str):
        super().__init__(reason)
        self.sample, self.reason = sample, reason


class GuardedBytes:
    """Images and texts by sample number; nothing is copied before it is needed."""

    def __init__(self, paths: list[Path], shard_N: np.ndarray, columns: dict[str, np.ndarray]):
        allow_open(len(paths))
        self.maps = [map_bytes(path) for path in paths]
        self.shard_N, self.columns = shard_N, columns
        self.trusted_N = np.zeros(len(shard_N), dtype=bool)

    def image(self, sample: int) -> np.ndarray:
        """An image's encoded bytes, uint8, checked against the index on first use; raises BadSample."""
        encoded_B = self._slice("image", sample)
        if not self.trusted_N[sample]:
            if zlib.crc32(encoded_B) != self.columns["image_crc"][sample]:
                raise BadSample(sample, "its bytes have changed since the shard was indexed (checksum)")
            self.trusted_N[sample] = True
        return encoded_B

    def text(self, sample: int) -> SampleText:
        """A sample's captions, label and attributes; raises BadSample."""
        try:
            return read_text(lambda extension: self._text_member(extension, sample))
        except ValueError as reason:
            raise BadSample(sample, str(reason)) from None

    def close(self) -> None:
        """Releases the shards."""
        self.maps = []

    def _slice(self, part: str, sample: int) -> np.ndarray:
        start, size = int(self.columns[f"{part}_offset"][sample]), int(self.columns[f"{part}_size"][sample])
        return self.maps[self.shard_N[sample]][start : start + size]

    def _text_member(self, extension: str, sample: int) -> bytes:
        raw_B = self._slice(extension, sample)
        if len(raw_B) and zlib.crc32(raw_B) != self.columns[f"{extension}_crc"][sample]:
            raise ValueError(f"its .{extension} has changed since the shard was indexed (checksum)")
        return raw_B.tobytes()
