"""What the doctor examines, and what a finding is; each check is a generator of findings in a file of this folder."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import nn

from duotone.data.batch import Batch
from duotone.data.dataset import Dataset
from duotone.data.refusal import Refused
from duotone.engine import draws
from duotone.engine.conditioning.base import Conditioner, Facts
from duotone.engine.conditioning.text import EncoderAbsent
from duotone.engine.doctor.encoders import encoding_once, stand_in
from duotone.engine.recipe import Recipe

ROWS = 4096


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report: what was examined, its state, and what to do about it."""

    level: Literal["fault", "warning", "fine", "unknown"]
    subject: str
    says: str


@dataclass
class Patient:
    """A recipe with the data and the network that it would train; nothing is trained, and the UNet has no storage."""

    recipe: Recipe

    @cached_property
    def data(self) -> Dataset | None:
        """The data, or None if the recipe names none."""
        recipe = self.recipe
        if recipe.data.shards is None:
            return None
        return recipe.data.open(torch.device("cpu"), require_captions=recipe.wants_captions)

    @cached_property
    def facts(self) -> Facts:
        """The class and attribute names of the data, or stand-ins without data."""
        if self.data is None:
            return Facts(classes=tuple("0123456789"), attributes=tuple("abcdefgh"))
        named = (self.data.classes, self.data.attributes)
        return Facts(**{k: None if v is None else tuple(v) for k, v in zip(("classes", "attributes"), named)})

    @cached_property
    def batch(self) -> Batch:
        """ROWS training rows: a few samples repeated, each time at another position of the run."""
        few = self.few()
        rows_N = np.arange(ROWS) % len(few.keys)
        pick = torch.from_numpy(rows_N)
        return replace(
            few,
            positions_N=np.arange(ROWS, dtype=np.int64),
            keys=[few.keys[i] for i in rows_N],
            images_NHWC=few.images_NHWC[pick],
            captions=few.captions and [few.captions[i] for i in rows_N],
            labels_N=None if few.labels_N is None else few.labels_N[pick],
            attributes_NK=None if few.attributes_NK is None else few.attributes_NK[pick],
        )

    def few(self, images: int = 16) -> Batch:
        if self.data is not None:
            positions_N = np.arange(min(images, self.data.count), dtype=np.int64)
            return self.data.read(draws.plan(self.recipe.seed, positions_N, self.data.count))
        g, side = torch.Generator().manual_seed(0), self.recipe.data.size
        shape = (images, side, side, self.recipe.data.channels)
        return Batch(
            positions_N=np.arange(images),
            keys=[str(i) for i in range(images)],
            images_NHWC=torch.randint(0, 256, shape, generator=g, dtype=torch.uint8),
            captions=[f"picture {i}" for i in range(images)],
            labels_N=torch.arange(images) % len(self.facts.classes),
            attributes_NK=torch.randint(0, 2, (images, len(self.facts.attributes)), generator=g, dtype=torch.int8),
        )

    @cached_property
    def conditioners(self) -> tuple[dict[str, Conditioner], dict[str, Refused]]:
        """The conditioners that can be built here, and why the others cannot."""
        torch.manual_seed(0)
        built, absent = {}, {}
        for condition in self.recipe.conditioning:
            try:
                built[condition.kind] = condition.build(self.recipe.model, self.facts).eval()
            except Refused as refusal:
                absent[condition.kind] = refusal
        return built, absent

    @cached_property
    def measurable(self) -> dict[str, Conditioner]:
        """The conditioners that the batch can be sent through; a missing text encoder is replaced by a stand-in."""
        built, absent = self.conditioners
        found = {}
        for condition in self.recipe.conditioning:
            if condition.kind in built:
                found[condition.kind] = encoding_once(built[condition.kind])
            elif isinstance(absent[condition.kind], EncoderAbsent):
                found[condition.kind] = stand_in(condition, self.recipe.model)
        return found

    @cached_property
    def unet(self) -> nn.Module:
        with torch.device("meta"):
            return self.recipe.model.build()
