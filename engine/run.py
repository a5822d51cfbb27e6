"""A run in progress: what it reads, how it is saved as a checkpoint and how it resumes from one."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from duotone.data.refusal import Refused
from duotone.data.shards import Dataset
from duotone.engine import artifact, checkpoint, draws, speed
from duotone.engine.conditioning.base import Facts
from duotone.engine.distributed import zero
from duotone.engine.distributed.sharded import Sharded
from duotone.engine.drawing import Examples
from duotone.engine.evaluate.images import Images
from duotone.engine.log import Logger
from duotone.engine.model.network import Network
from duotone.engine.recipe import Recipe
from duotone.engine.whole_step import WholeStep
from duotone.kernels import attention_backends


@dataclass
class Run:
    """A run in progress."""

    recipe: Recipe
    choice: speed.Choice
    ranks: zero.Ranks
    data: Dataset
    facts: Facts
    network: Network
    sharded: Sharded
    whole_step: WholeStep | None = None
    images: int = 0
    log: Logger | None = None
    began_at: int = 0
    """Images trained on before this process started."""
    graphs_before: int = 0
    """Graphs compiled in this process's first two steps; any later one is a recompilation."""
    examples: Examples = Examples()
    held_out: Images | None = None
    """The held-out images on which rank 0 measures the loss."""
    saved: int | None = None
    """Images trained on at the newest checkpoint."""
    unread_before: tuple[str, ...] = ()
    """A line for each sample that could not be read before the checkpoint that this process resumed from."""
    parts_before: tuple[dict, ...] = ()
    """How the images before `began_at` were trained on: one part for each earlier process."""
    notes: list[str] = field(default_factory=list)
    """A line for each substitution."""

    @property
    def step(self) -> int:
        return self.images // self.recipe.batch_size

    @property
    def steps_here(self) -> int:
        """Optimizer steps taken by this process."""
        return (self.images - self.began_at) // self.recipe.batch_size

    def due(self, every: int) -> bool:
        """Whether what is due every `every` images is due now; False at the run's end, where it is done in any case."""
        return every > 0 and self.images % every == 0 and self.images < self.recipe.images

    @property
    def parts(self) -> list[dict]:
        """How the run's images were trained on: one part for each process, this one's last."""
        here = {
            "images": [self.began_at, self.images],
            "device": self.choice.device,
            "precision": self.choice.precision,
            "ranks": self.ranks.count,
            "decoder": self.data.decoder,
        }
        return [*self.parts_before, *([here] if self.steps_here else [])]


def plans(run: Run, begin: int) -> Iterator:
    """The samples that this rank reads, micro-batch by micro-batch, from image `begin` to the run's last.

    The reading thread runs ahead of training, so nothing here may depend on `run.images`.
    """
    recipe = run.recipe
    micro = recipe.micro_batch(run.ranks.count)
    for first in range(begin, recipe.images, recipe.batch_size):
        for positions_N in draws.micro_batches(first, recipe.batch_size, micro, run.ranks.rank, run.ranks.count):
            yield draws.plan(recipe.seed, positions_N, run.data.count)


def save(run: Run) -> None:
    """Publishes a checkpoint unless the newest one is of this very step; called on all ranks, written by rank 0."""
    if run.saved == run.images:
        return
    tensors = {kind: run.sharded.gather(kind) for kind in ("weight", *run.sharded.optimizer.STATE)}
    unread = unread_samples(run)
    chosen = zero.gathered([{"rows": attention_backends.choices(), "where": attention_backends.measured_on()}])
    if run.ranks.rank == 0:
        folder = run.recipe.folder / "checkpoints"
        facts = {
            "counters": run.sharded.counters(),
            "data": run.data.fingerprint,
            "attention": chosen,
            "unread": unread,
            "parts": run.parts,
        }
        header = artifact.header(run.recipe, run.facts, run.images)
        checkpoint.publish(folder, run.images, tensors, facts, header)
        checkpoint.retire(folder, run.recipe.checkpoint.keep, run.images)
    run.saved = run.images
    zero.wait()


def unread_samples(run: Run) -> list[str]:
    """A line for each sample that any rank could not read, in this process or an earlier one."""
    return sorted({*run.unread_before, *zero.gathered(run.data.unread())})


def resume(run: Run, path: Path) -> str:
    """Loads a checkpoint into the run; returns a line for the log."""
    manifest, tensors = checkpoint.read(path)
    checkpoint.refuse_other_network(path, tensors["weight"], run.sharded.shapes())
    if manifest["data"] != run.data.fingerprint:
        raise Refused(f"{path} was trained on other data than {run.recipe.data.shards} now holds: give another --out")
    if manifest["images"] > run.recipe.images:
        raise Refused(
            f"{path} has seen more than images = {run.recipe.images}: give --images {manifest['images']} or more"
        )
    for kind, named in tensors.items():
        run.sharded.scatter(kind, named)
    run.sharded.restore_counters(manifest["counters"])
    chosen = manifest.get("attention", [])
    for theirs in [chosen] if isinstance(chosen, dict) else chosen[run.ranks.rank :][:1] or chosen[:1]:
        attention_backends.keep_choices(**theirs)
    run.unread_before, run.parts_before = tuple(manifest.get("unread", ())), tuple(manifest.get("parts", ()))
    run.images = run.saved = manifest["images"]
    return f"resumed from {path} at {run.images:,} images"


def changes_on_resume(run: Run) -> list[str]:
    """A line for the log if a resumed run changes its precision or decoder: allowed, although its numbers change."""
    before, here = run.parts_before[-1:], {"precision": run.choice.precision, "decoder": run.data.decoder}
    changed = [
        f"{name} {part[name]} until here, {here[name]} from here on"
        for part in before
        for name in here
        if part[name] != here[name]
    ]
    return [f"the run resumes with other settings than before: {'; '.join(changed)}"] if changed else []
