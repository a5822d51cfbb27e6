"""A recipe is a whole run as data: frozen dataclasses, overridden on the command line (entry.py), stored as JSON (recipe_json.py)."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

from duotone.data.field_types import refuse_other_types
from duotone.data.refusal import Refused, at_least, share
from duotone.data.shards import Shards
from duotone.engine.checkpoint import Checkpoints
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.temperature import Temperature
from duotone.engine.conditioning.text import ByteText, ClipText, EncoderText
from duotone.engine.distributed.zero import Zero
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.optimizers.ema import Ema
from duotone.engine.optimizers.muon import Muon
from duotone.engine.preview import Previews
from duotone.engine.speed import Speed
from duotone.engine.validation import Validation

Condition = ClipText | ByteText | EncoderText | Label | Attributes | ClassMap | LowResolution | Hole | Temperature
Objectives = EDM | DDPM | Flow
Optimizers = AdamW | Muon


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that defines a run."""

    name: str
    """Names the run; its folder is runs/<name> unless --out is given."""
    data: Shards = Shards()
    conditioning: tuple[Condition, ...] = ()
    """The conditions that the network is given."""
    objective: Objectives = EDM()
    """What the network learns to predict."""
    model: UNetConfig = UNetConfig()
    optimizer: Optimizers = AdamW()
    ema: Ema = Ema()
    zero: Zero = Zero()
    speed: Speed = Speed()
    checkpoint: Checkpoints = Checkpoints()
    preview: Previews = Previews()
    validation: Validation = Validation()
    log: Log = Log()
    batch_size: int = 128
    """Images per optimizer step, over all ranks."""
    accumulation: int | None = None
    """Micro-batches per rank and optimizer step; by default the fewest that fit into the GPU's memory; one on a CPU."""
    images: int = 10_000_000
    """Training budget in images."""
    drop_together: float = 0.0
    """Share of training images that lose all conditions at once, as the unconditional branch of guidance does."""
    flip: bool = False
    """Mirror images at random."""
    seed: int = 0
    """Seed of every random number of the run."""
    start: Path | None = None
    """Weights to begin from instead of random ones: a run's folder, a diffusers UNet folder, or a safetensors file from
    either or in Stable Diffusion's original layout."""
    out: Path | None = None
    """The run's folder."""
    fresh: bool = False
    """Start anew; the folder of an earlier run is moved aside."""

    def __post_init__(self):
        for name in ("start", "out"):
            if isinstance(getattr(self, name), str):  # as a script may give it
                object.__setattr__(self, name, Path(getattr(self, name)))

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.name

    def placed(self) -> "Recipe":
        """The recipe with "." or ".." as its folder made absolute: the working directory itself may be moved aside."""
        nameless = self.folder.name in ("", "..")
        return replace(self, out=Path(os.path.abspath(self.folder))) if nameless else self

    @property
    def again(self) -> str:
        """The command that resumes an interrupted run, in words."""
        return "the same command without --fresh" if self.fresh else "the same command"

    @property
    def wants_captions(self) -> bool:
        return any(condition.kind == "text" for condition in self.conditioning)

    def check(self) -> None:
        """Raises Refused on values of a wrong type or out of range, naming the key, before anything heavy loads."""
        refuse_other_types(self)
        for name in ("batch_size", "images"):
            at_least(name, getattr(self, name), 1)
        at_least("accumulation", 1 if self.accumulation is None else self.accumulation, 1)
        at_least("seed", self.seed, 0)
        if self.seed >= 2**64:
            raise Refused(f"seed = {self.seed}: it must be below 2^64 = {2**64}")
        at_least("zero.bucket", self.zero.bucket, 2)
        self.model.check()
        self.objective.check()
        self.optimizer.check()
        self.ema.check()
        self.checkpoint.check()
        self.preview.check(self.objective)
        self.validation.check()
        self.log.check()
        self.check_budget()
        self.check_images()
        self.check_conditioning()
        self.check_stage()

    def check_budget(self) -> None:
        """Raises Refused unless everything counted in images is a whole number of steps."""
        if self.images % self.batch_size:
            rounded = max(1, round(self.images / self.batch_size)) * self.batch_size
            raise Refused(
                f"images = {self.images} is not a multiple of batch_size = {self.batch_size}: {rounded} would be"
            )
        for name in ("checkpoint", "preview", "validation"):
            every = getattr(self, name).every
            if every % self.batch_size:
                near = max(1, round(every / self.batch_size)) * self.batch_size
                raise Refused(
                    f"{name}.every = {every} is not a multiple of batch_size = {self.batch_size}: {near} would be"
                )
        if self.validation.every and not self.data.held_out:
            raise Refused(
                f"validation.every = {self.validation.every}, but no image is held out: set data.held_out, say to 0.05"
            )

    def check_images(self) -> None:
        for name in ("in_channels", "out_channels"):
            if getattr(self.model, name) != self.data.channels:
                raise Refused(f"model.{name} = {getattr(self.model, name)}, but data.channels = {self.data.channels}")

    def check_stage(self) -> None:
        if self.zero.bucket % 2:
            raise Refused(
                f"zero.bucket = {self.zero.bucket}: DeepSpeed lays gradients out in pairs, so give an even number"
            )
        if self.zero.stage > self.optimizer.largest_stage:
            raise Refused(
                f"zero.stage = {self.zero.stage}, but {type(self.optimizer).__name__} needs whole matrices, which stage 3 "
                f"divides among the ranks: take stage {self.optimizer.largest_stage}, or optimizer:adam-w"
            )
        if self.speed.compile and self.zero.stage == 3:
            raise Refused(
                "speed.compile = True, but ZeRO-3 gathers weights within the blocks: leave it off, or take stage 2"
            )

    def check_conditioning(self) -> None:
        kinds = [condition.kind for condition in self.conditioning]
        if len(set(kinds)) < len(kinds):
            raise Refused(f"conditioning names a kind twice: {', '.join(kinds)}")
        for i, condition in enumerate(self.conditioning):
            share(f"conditioning.{i}.dropout", condition.dropout)
        share("drop_together", self.drop_together)
        if kinds == ["temperature"]:
            raise Refused("conditioning has a Temperature, but nothing that it could guide: add a condition")
        if "temperature" in kinds:
            never = [c.kind for c in self.conditioning if c.kind != "temperature" and c.dropout == 0]
            if never and self.drop_together == 0:
                raise Refused(
                    "conditioning has a Temperature, which trains against the unconditional prediction, but "
                    f"{', '.join(never)} is never dropped, so that prediction is never trained: give it a dropout above 0, or set drop_together"
                )
            low, guidance = self.conditioning[kinds.index("temperature")].low, self.preview.guidance
            if guidance < 1 or low * guidance > 1 + 1e-5:
                most = f"to {1 / low:g}" if low else "or more"
                raise Refused(f"preview.guidance = {guidance}: a model with this Temperature takes 1 {most}")
        gives_tokens = any(condition.port == "tokens" for condition in self.conditioning)
        if self.model.reads_tokens != gives_tokens:
            where = "model.attention has levels that are" if "cross" in self.model.attention else "model.middle is"
            raise Refused(
                f"{where} cross, but no condition gives tokens: take none or self there"
                if self.model.reads_tokens
                else "a condition gives tokens, but model.attention and model.middle have no cross level that reads them"
            )
        for condition in self.conditioning:
            if isinstance(condition, ByteText) and condition.width != self.model.context_width:
                raise Refused(
                    f"model.context_width = {self.model.context_width}, but the text's width is {condition.width}"
                )

    def micro_batch(self, ranks: int) -> int:
        """Images per rank and forward pass."""
        times = self.accumulation or 1
        micro, rest = divmod(self.batch_size, ranks * times)
        if rest or not micro:
            raise Refused(f"batch_size = {self.batch_size} is not divisible by {ranks} ranks x accumulation = {times}")
        return micro
