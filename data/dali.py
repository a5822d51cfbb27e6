"""Encoded bytes -> square uint8 images with DALI, on the CPU or, hardware-accelerated, on the GPU.

The rectangles and the bicubic filter are the same as with Pillow. The bytes are slices of mapped shards, already
checked; DALI reads them in place.
"""

import functools
import io
import threading

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, types
from PIL import Image

from duotone.data.framing import upright
from duotone.data.pillow import Undecodable
from duotone.data.refusal import Refused

COLOURS = {1: types.GRAY, 3: types.RGB}


class DaliDecoder:
    """Decodes batches of any size; the pipeline is built for the largest batch seen so far."""

    name = "dali"

    def __init__(self, side: int, channels: int, threads: int, device: torch.device):
        self.side, self.channels, self.threads, self.device = side, channels, threads, device
        self.lock = threading.Lock()
        self.pipeline: Pipeline | None = None

    def decode(self, encoded: list[np.ndarray], boxes_N4: np.ndarray, orientations_N: np.ndarray) -> torch.Tensor:
        """Images uint8 (N, side, side, channels) on the device from N encoded images.

        Raises Undecodable for an image that DALI rejects, and Refused if DALI can decode nothing on this machine.
        """
        with self.lock:
            try:
                images_NHWC = self._run(encoded, boxes_N4)
            except RuntimeError as error:
                raise self._culprit(error, encoded, boxes_N4) from None
        for place in np.flatnonzero(orientations_N != 1).tolist():
            turned_HWC = upright(images_NHWC[place].cpu().numpy(), int(orientations_N[place]))
            images_NHWC[place] = torch.from_numpy(turned_HWC.copy())
        return images_NHWC

    def close(self) -> None:
        """Releases the pipeline and its threads."""
        self.pipeline = None

    def _run(self, encoded: list[np.ndarray], boxes_N4: np.ndarray) -> torch.Tensor:
        pipeline = self._pipeline_for(len(encoded))
        boxes_N4 = boxes_N4.astype(np.int32)
        pipeline.feed_input("encoded", encoded)
        pipeline.feed_input("corner", np.ascontiguousarray(boxes_N4[:, :2]))
        pipeline.feed_input("extent", np.ascontiguousarray(boxes_N4[:, 2:]))
        (images,) = pipeline.run()
        return self._as_torch(images.as_tensor())

    def _pipeline_for(self, count: int) -> Pipeline:
        if self.pipeline is None or self.pipeline.max_batch_size < count:
            self.pipeline = self._build(count)
        return self.pipeline

    def _build(self, count: int) -> Pipeline:
        gpu = self.device.type == "cuda"
        index = (self.device.index if self.device.index is not None else torch.cuda.current_device()) if gpu else None
        # DALI must not run ahead: the reader's own thread does that, and each call may follow any plan.
        pipeline = Pipeline(count, self.threads, index, exec_pipelined=False, exec_async=False, prefetch_queue_depth=1)
        with pipeline:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
            corner = fn.external_source(name="corner", dtype=types.INT32, ndim=1)
            extent = fn.external_source(name="extent", dtype=types.INT32, ndim=1)
            cut = fn.decoders.image_slice(
                encoded,
                corner,
                extent,
                device="mixed" if gpu else "cpu",
                axes=[0, 1],
                normalized_anchor=False,
                normalized_shape=False,
                output_type=COLOURS[self.channels],
                adjust_orientation=False,  # decode() applies it, to the small square
            )
            size = [self.side, self.side]
            pipeline.set_outputs(fn.resize(cut, size=size, interp_type=types.INTERP_CUBIC, antialias=True))
        pipeline.build()
        return pipeline

    def _as_torch(self, images) -> torch.Tensor:
        if self.device.type != "cuda":
            return torch.from_numpy(np.array(images))
        from nvidia.dali.plugin.pytorch import feed_ndarray

        images_NHWC = torch.empty(images.shape(), dtype=torch.uint8, device=self.device)
        feed_ndarray(images, images_NHWC, cuda_stream=torch.cuda.current_stream(self.device))
        return images_NHWC

    def _culprit(self, error: RuntimeError, encoded: list[np.ndarray], boxes_N4: np.ndarray) -> Exception:
        """The exception to raise for a failed batch; DALI does not say which image failed, so each is tried alone.

        No image is to blame if memory is short or if DALI cannot even decode a picture known to be good.
        """
        self.pipeline = None
        if lacks_memory(error):
            return error
        broken = self._fault([sample_jpeg()], np.array([[0, 0, 16, 16]]))
        if broken is not None:
            remedy = "use --data.decoder pillow"
            return (
                broken
                if lacks_memory(broken)
                else Refused(f"data.decoder is dali, which can decode nothing here ({error_text(broken)}): {remedy}")
            )
        for place in range(len(encoded)):
            alone = self._fault(encoded[place : place + 1], boxes_N4[place : place + 1])
            if alone is not None:
                return alone if lacks_memory(alone) else Undecodable(place, "DALI cannot decode it")
        return RuntimeError(
            f"DALI failed on a batch of {len(encoded)} images, each of which it can decode alone: {error}"
        )

    def _fault(self, encoded: list[np.ndarray], boxes_N4: np.ndarray) -> RuntimeError | None:
        """The error that a new pipeline raises on these images, or None."""
        try:
            self._run(encoded, boxes_N4)
        except RuntimeError as error:
            return error
        finally:
            self.pipeline = None


def lacks_memory(error: RuntimeError) -> bool:
    return any(word in error_text(error).lower() for word in ("memory", "bad_alloc", "allocation"))


def error_text(error: RuntimeError) -> str:
    """The message at the end of DALI's traceback, as one line."""
    return " ".join(str(error).split("encountered:")[-1].split())[:300]


@functools.cache
def sample_jpeg() -> np.ndarray:
    """The bytes of a picture that every decoder can decode."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16), "orange").save(file, "JPEG")
    return np.frombuffer(file.getvalue(), dtype=np.uint8)
