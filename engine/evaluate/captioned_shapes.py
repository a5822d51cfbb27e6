"""How well a model trained on the captioned shapes follows captions, judged from the pixels of samples of every caption."""

from dataclasses import dataclass

import numpy as np

from duotone.data.captioned_shapes import captions, drawing_of
from duotone.engine.artifact import Model
from duotone.engine.evaluate.sample_settings import SampleSettings
from duotone.engine.evaluate.shape_reader import confusion, read_back
from duotone.engine.sample import sample

PARTS = ("shape", "colour", "background")


@dataclass(frozen=True, kw_only=True)
class Obedience:
    """Shares of samples that show a part of their caption correctly."""

    samples: int
    shape: float
    colour: float
    background: float
    colour_and_background: float
    everything: float
    checker: dict[str, float]
    """The checker's own accuracy on held-out real renders."""


def obedience(model: Model, settings: SampleSettings, *, per_caption: int = 1) -> Obedience:
    """Samples every caption `per_caption` times, and reads from each picture what it shows."""
    asked = [caption for caption in captions() for _ in range(per_caption)]
    images_NHWC = sample(model, prompts=asked, **settings.for_sample())
    right_NP = np.array([rightness(image, caption) for image, caption in zip(images_NHWC, asked)])
    own = confusion(size=model.size)
    return Obedience(
        samples=len(asked),
        **{part: float(right_NP[:, i].mean()) for i, part in enumerate(PARTS)},
        colour_and_background=float(right_NP[:, 1:].all(1).mean()),
        everything=float(right_NP.all(1).mean()),
        checker={part: own.accuracy(part) for part in PARTS},
    )


def rightness(image_HWC: np.ndarray, caption: str) -> list[bool]:
    seen, meant = read_back(image_HWC), drawing_of(caption)
    return [getattr(seen, part) == getattr(meant, part) for part in PARTS]
