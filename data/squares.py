"""Images as stored -> a batch's square uint8 images: stored pixels are sliced, the rest decoded, a border added."""

import numpy as np
import torch

from duotone.data.framing import Frame, boxes
from duotone.data.guarded import BadSample
from duotone.data.pillow import Undecodable, cut_stored
from duotone.data.tar_index import KINDS

STORED = KINDS.index("npy")


class Squares:
    """Cuts, resizes and pads images as the configuration says; `columns` holds the index's data on every sample."""

    def __init__(self, frame: Frame, columns: dict[str, np.ndarray], decoder):
        self.frame, self.columns, self.decoder = frame, columns, decoder

    def images(self, samples_N: np.ndarray, encoded: list[np.ndarray], crops_N2: np.ndarray) -> torch.Tensor:
        """Images uint8 (N, size, size, channels) of N samples from their bytes; raises BadSample."""
        boxes_N4 = self._boxes(samples_N, crops_N2)
        stored_N = self.columns["kind"][samples_N] == STORED
        if not stored_N.any():
            return self._bordered(self._decoded(samples_N, encoded, boxes_N4))
        inner_NHWC = np.empty((len(encoded), self.frame.side, self.frame.side, self.frame.channels), dtype=np.uint8)
        for place in np.flatnonzero(stored_N).tolist():
            image_HWC = self._pixels(samples_N[place], encoded[place])
            inner_NHWC[place] = cut_stored(image_HWC, boxes_N4[place], self.frame.side, self.frame.channels)
        if not stored_N.all():
            others = np.flatnonzero(~stored_N)
            decoded = self._decoded(samples_N[others], [encoded[place] for place in others], boxes_N4[others])
            inner_NHWC[others] = decoded.cpu().numpy()
        return self._bordered(torch.from_numpy(inner_NHWC))

    def _boxes(self, samples_N: np.ndarray, crops_N2: np.ndarray) -> np.ndarray:
        sides_N2 = np.stack([self.columns["height"][samples_N], self.columns["width"][samples_N]], axis=1)
        drawn_N2 = crops_N2 if self.frame.crop == "random" else None
        return boxes(sides_N2, self.columns["orientation"][samples_N], drawn_N2, self.frame.resize)

    def _decoded(self, samples_N: np.ndarray, encoded: list[np.ndarray], boxes_N4: np.ndarray) -> torch.Tensor:
        try:
            return self.decoder.decode(encoded, boxes_N4, self.columns["orientation"][samples_N])
        except Undecodable as bad:
            raise BadSample(int(samples_N[bad.place]), bad.reason) from None

    def _pixels(self, sample: int, encoded_B: np.ndarray) -> np.ndarray:
        """The pixels of a .npy member, which are its last bytes."""
        height, width, channels = (int(self.columns[name][sample]) for name in ("height", "width", "channels"))
        return encoded_B[-height * width * channels :].reshape(height, width, channels)

    def _bordered(self, inner_NHWC: torch.Tensor) -> torch.Tensor:
        pad, size, side = self.frame.pad, self.frame.size, self.frame.side
        shape = (len(inner_NHWC), size, size, self.frame.channels)
        if not pad:
            return inner_NHWC
        if inner_NHWC.device.type == "cpu":  # numpy, as torch would wake its thread pool for a quarter of a megabyte
            images_NHWC, inner_NHWC = np.zeros(shape, dtype=np.uint8), inner_NHWC.numpy()
        else:
            images_NHWC = inner_NHWC.new_zeros(shape)
        images_NHWC[:, pad : pad + side, pad : pad + side] = inner_NHWC
        return torch.as_tensor(images_NHWC)
