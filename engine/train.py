"""train(recipe): set up, then the loop.

N images of a micro-batch, C channels, H x W pixels.
"""

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotone.data import captioned_shapes
from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.data.shards import Dataset
from duotone.engine import artifact, checkpoint, draws, preview, run_folder, speed, zero
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.log import Logger
from duotone.engine.memory import Estimate, estimate
from duotone.engine.model.network import Network
from duotone.engine.recipe import Recipe, differences, say, to_json
from duotone.kernels.diffuse import diffuse
from duotone.kernels.dispatch import fallbacks


@dataclass
class Run:
    """A run in progress."""

    recipe: Recipe
    choice: speed.Choice
    ranks: zero.Ranks
    data: Dataset
    facts: Facts
    network: Network
    sharded: zero.Sharded
    images: int = 0
    log: Logger | None = None
    graphs_at_step_2: int = 0

    @property
    def step(self) -> int:
        return self.images // self.recipe.batch_size


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end, or on from where it stopped; returns the run's folder.

    Raises Refused on a recipe, data or run folder that cannot be used, before anything is written.
    """
    recipe.check()
    run = set_up(recipe)
    try:
        batches = run.data.batches(plans(run))
        while run.images < recipe.images:
            train_step(run, batches)
            if due(run, recipe.preview.every):
                draw_preview(run)
            if due(run, recipe.checkpoint.every):
                save(run)
        finish(run)
    finally:
        run.log.close()
        run.data.close()
        zero.leave()
    return recipe.folder


def train_step(run: Run, batches: Iterator[Batch]) -> None:
    """One optimizer step: `accumulation` micro-batches on every rank, then the update of weights and EMA."""
    recipe, began = run.recipe, run.images
    run.images += recipe.batch_size
    run.sharded.optimizer.set(
        lr=recipe.optimizer.lr_at(began, recipe.images), ema_decay=recipe.ema.decay(run.images, recipe.batch_size)
    )
    losses, traced, skipped = [], [], False
    for _ in range(recipe.accumulation):
        waiting = time.monotonic()
        batch = next(batches)
        run.log.waited(time.monotonic() - waiting)
        loss, input_NCHW = micro_step(run, batch)
        losses.append(loss.detach())
        skipped |= run.sharded.step()
        if recipe.log.trace:
            traced += fingerprints(batch, input_NCHW)

    def numbers() -> dict[str, float]:
        return {
            "loss": zero.mean(torch.stack(losses).mean()).item(),
            "grad_norm": run.sharded.grad_norm(),
            "learning_rate": recipe.optimizer.lr_at(began, recipe.images),
        }

    if recipe.log.trace:
        trace(run, traced, zero.mean(torch.stack(losses).mean()).item())
    run.log.step(run.step, run.images, recipe.batch_size, skipped, numbers)
    if run.step == 2:
        run.graphs_at_step_2 = speed.compiled_graphs()


def micro_step(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Forward and backward of one micro-batch: the loss, and the network's input for the trace."""
    recipe, device = run.recipe, run.sharded.device
    objective, positions_N = recipe.objective, batch.positions_N
    sigma_N = noise_levels(recipe, positions_N)
    input_NCHW, target_NCHW = diffuse(
        batch.images_NHWC.to(device, non_blocking=True),
        flips(recipe, positions_N).to(device),
        objective.coefficients(sigma_N).float().to(device),
        recipe.seed,
        torch.as_tensor(positions_N).to(device),
        int(draws.Purpose.NOISE),
        dtype=run.choice.dtype,
    )
    time_N = objective.scalings(sigma_N).noise_N.float().to(device)
    tensors, keep = conditions(run, batch)
    output_NCHW, log_scale_N = run.sharded(input_NCHW, time_N, tensors, keep)
    loss = objective(output_NCHW, target_NCHW, sigma_N.to(device), log_scale_N)
    run.sharded.backward(loss)
    return loss, input_NCHW


def noise_levels(recipe: Recipe, positions_N: np.ndarray) -> Tensor:
    u_N = draws.uniform(recipe.seed, positions_N, draws.Purpose.SIGMA)[:, 0]
    if recipe.objective.stratified:
        u_N = draws.stratified(u_N, positions_N, recipe.batch_size)
    return recipe.objective.draw_sigma(u_N)


def flips(recipe: Recipe, positions_N: np.ndarray) -> Tensor:
    if not recipe.flip:
        return torch.zeros(len(positions_N), dtype=torch.bool)
    return draws.uniform(recipe.seed, positions_N, draws.Purpose.FLIP)[:, 0] < 0.5


def conditions(run: Run, batch: Batch) -> tuple[dict, dict]:
    """Each conditioner's tensors and the rows it keeps; the others are dropped to their null state."""
    recipe, device = run.recipe, run.sharded.device
    flip_N = flips(recipe, batch.positions_N)
    tensors, keep = conditioned(run.network.conditioners, batch, recipe.seed, flip_N, recipe.drop_together)
    on_device = {kind: {name: t.to(device) for name, t in named.items()} for kind, named in tensors.items()}
    return on_device, {kind: keep_N.to(device) for kind, keep_N in keep.items()}


def due(run: Run, every: int) -> bool:
    return every > 0 and run.images % every == 0 and run.images < run.recipe.images


# ------------------------------------------------------------------------------------------------------- set up


def set_up(recipe: Recipe) -> Run:
    """Everything before the first step: what can be refused comes before what is written."""
    choice = speed.choose(recipe.speed)
    speed.set_up(recipe.speed, choice)
    stored = None if recipe.fresh else run_folder.stored_recipe(recipe.folder)
    refuse_other_run(recipe, stored)
    recipe.micro_batch(int(zero.world_size()))
    ranks = zero.join(choice.device)
    with zero.rank_0_first(ranks):
        recipe = with_embedded_data(recipe)
        data = recipe.data.open(ranks.device, require_captions=wants_captions(recipe))
    facts = Facts(classes=as_tuple(data.classes), attributes=as_tuple(data.attributes))
    torch.manual_seed(recipe.seed)
    network = artifact.build(recipe, facts)
    network.unet.checkpointing = recipe.speed.gradient_checkpointing
    micro = recipe.micro_batch(ranks.count)
    predicted = estimate(network, recipe, micro, choice, ranks.count)
    with zero.rank_0_first(ranks):
        if ranks.rank == 0:
            begin_folder(recipe, stored)
    recipe = replace(recipe, objective=recipe.objective.fitted(data))
    network.to(ranks.device)
    sharded = start_sharded(recipe, network, choice, micro)
    run = Run(recipe, choice, ranks, data, facts, network, sharded)
    resumed = resume(run)
    run.log = Logger(
        recipe.log, recipe.folder, recipe.images, run.images, speaks=ranks.rank == 0, recipe=to_json(recipe)
    )
    announce(run, predicted, resumed)
    return run


def start_sharded(recipe: Recipe, network: Network, choice: speed.Choice, micro: int) -> zero.Sharded:
    if choice.compile:
        blocks = speed.compile_blocks(network, recipe.speed.backend)
        say(f"compiling {blocks} blocks on first use")
    return zero.Sharded(
        network,
        recipe.optimizer.build(network),
        zero.settings(
            recipe.zero,
            batch=recipe.batch_size,
            micro=micro,
            accumulation=recipe.accumulation,
            precision=choice.precision,
            clip=recipe.optimizer.clip,
        ),
    )


def refuse_other_run(recipe: Recipe, stored: dict | None) -> None:
    changed = [] if stored is None else differences(stored, recipe)
    if changed:
        raise Refused(
            f"{recipe.folder} holds another run ({'; '.join(changed)}): give another --out, or --fresh to move it aside"
        )


def begin_folder(recipe: Recipe, stored: dict | None) -> None:
    if recipe.fresh:
        run_folder.move_aside(recipe.folder)
    recipe.folder.mkdir(parents=True, exist_ok=True)
    if recipe.fresh or stored is None:
        run_folder.write_json(recipe.folder / "recipe.json", to_json(replace(recipe, fresh=False)))


def with_embedded_data(recipe: Recipe) -> Recipe:
    """Without shards, the embedded captioned shapes, written once as real shards beside the run's folder."""
    if recipe.data.shards is not None:
        return recipe
    folder = recipe.folder.parent / f"captioned_shapes-{recipe.data.size}px"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        captioned_shapes.write(folder, count=4096, size=recipe.data.size, seed=0)
    return replace(recipe, data=replace(recipe.data, shards=folder))


def wants_captions(recipe: Recipe) -> bool:
    return any("Text" in type(condition).__name__ for condition in recipe.conditioning)


def as_tuple(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def announce(run: Run, predicted: Estimate, resumed: str | None) -> None:
    """The plan in one line, then every substitution in one line each."""
    recipe, choice = run.recipe, run.choice
    parameters = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in run.network.parameters())
    micro = recipe.micro_batch(run.ranks.count)
    stage, why = zero.stage_taken(recipe.zero, choice.precision, recipe.accumulation)
    run.log.say(
        f"{recipe.name}: {parameters / 1e6:.1f} M parameters, {choice.precision} on {choice.device}"
        f"{', compiled' if choice.compile else ''}, batch {recipe.batch_size} = {micro} x {recipe.accumulation} "
        f"accumulations x {run.ranks.count} ranks, ZeRO-{stage}, about {predicted.gib:.1f} GiB per rank, "
        f"{run.data.count:,} samples decoded by {run.data.decoder}, {recipe.images:,} images = {recipe.images // recipe.batch_size:,} steps"
    )
    for line in [why, run.data.decoder_note, *run.data.notes, resumed, *speed.substitutions(choice)]:
        if line:
            run.log.say(line)


# ------------------------------------------------------------------------------------------------ plan and trace


def plans(run: Run) -> Iterator:
    """What this rank reads, micro-batch by micro-batch, from where the run stands to its end."""
    recipe = run.recipe
    micro = recipe.micro_batch(run.ranks.count)
    for first in range(run.images, recipe.images, recipe.batch_size):
        for positions_N in draws.micro_batches(first, recipe.batch_size, micro, run.ranks.rank, run.ranks.count):
            yield draws.plan(recipe.seed, positions_N, run.data.count)


def fingerprints(batch: Batch, input_NCHW: Tensor) -> list[tuple[int, str, str]]:
    """Position, sample key and a hash of what the network saw, for each image."""
    rows = input_NCHW.detach().float().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    texts = batch.captions or [""] * len(batch.keys)
    return [
        (int(position), key, hashlib.sha256(row.tobytes() + text.encode()).hexdigest())
        for position, key, row, text in zip(batch.positions_N, batch.keys, rows, texts)
    ]


def trace(run: Run, mine: list[tuple[int, str, str]], loss: float) -> None:
    """One row: the keys in the order of their positions, and one hash over every image's draws."""
    rows = sorted(zero.gathered(mine))
    digest = hashlib.sha256("".join(h for _, _, h in rows).encode()).hexdigest()
    run.log.trace({"images": run.images, "loss": loss, "keys": [key for _, key, _ in rows], "draws": digest})


# ------------------------------------------------------------------------------------------------- save, resume


def save(run: Run) -> None:
    """Publishes a checkpoint, from all ranks; rank 0 writes it."""
    tensors = {kind: run.sharded.gather(kind) for kind in checkpoint.KINDS}
    if run.ranks.rank == 0:
        folder = run.recipe.folder / "checkpoints"
        facts = {"counters": run.sharded.counters(), "data": run.data.fingerprint}
        checkpoint.publish(folder, run.images, tensors, facts)
        checkpoint.retire(folder, run.recipe.checkpoint.keep)
    zero.wait()


def resume(run: Run) -> str | None:
    """Puts the newest checkpoint that verifies into the run; says what was done."""
    path, passed_over = checkpoint.newest(run.recipe.folder / "checkpoints")
    if path is None:
        return "; ".join(passed_over) or None
    manifest, tensors = checkpoint.read(path)
    checkpoint.refuse_other_network(path, tensors["weight"], run.sharded.shapes())
    if manifest["data"] != run.data.fingerprint:
        raise Refused(f"{path} was trained on other data than {run.recipe.data.shards} now holds: give another --out")
    for kind, named in tensors.items():
        run.sharded.scatter(kind, named)
    run.sharded.restore_counters(manifest["counters"])
    run.images = manifest["images"]
    return "; ".join([*passed_over, f"resumed from {path} at {run.images:,} images"])


def finish(run: Run) -> None:
    """The last checkpoint, picture and export."""
    final, _ = checkpoint.newest(run.recipe.folder / "checkpoints")
    if final is None or not final.name.endswith(f"{run.images:012d}"):
        save(run)
    ema = run.sharded.gather("ema")
    if run.ranks.rank == 0:
        path = run.recipe.folder / "ema.safetensors"
        artifact.save(path, ema, run.recipe, run.facts, run.images)
        run_folder.write_json(run.recipe.folder / "record.json", record(run))
        written = draw_with(run, ema)
        run.log.say(f"done: EMA weights in {path}, pictures in {written[0].parent}")
    zero.wait()


def record(run: Run) -> dict:
    """What a run says of how it ran: every substitution, and whether compilation held."""
    return {
        "images": run.images,
        "device": run.choice.device,
        "precision": run.choice.precision,
        "ranks": run.ranks.count,
        "decoder": run.data.decoder,
        "fallbacks": fallbacks(),
        "graph_breaks": speed.graph_breaks(),
        "recompiles_after_step_2": speed.compiled_graphs() - run.graphs_at_step_2 if run.step > 2 else 0,
    }


def draw_preview(run: Run) -> None:
    ema = run.sharded.gather("ema")
    if run.ranks.rank == 0:
        draw_with(run, ema)
    zero.wait()


def draw_with(run: Run, ema: dict[str, Tensor]) -> list[Path]:
    """Pictures from the EMA weights, in a copy of the network."""
    network = artifact.build(run.recipe, run.facts)
    artifact.fill(network, ema, run.recipe.folder)
    network.eval().requires_grad_(False).to(run.ranks.device)
    model = artifact.Model(network, run.recipe.objective, run.facts, run.recipe, run.images)
    captions = some_captions(run) if run.data.has_captions else []
    folder = run.recipe.folder / "previews"
    return preview.draw(run.recipe.preview, model, captions, folder, f"images-{run.images:012d}")


def some_captions(run: Run) -> list[str]:
    """The first distinct captions of the data."""
    found: dict[str, None] = {}
    for i in range(min(run.data.count, 20 * run.recipe.preview.rows)):
        found.setdefault(run.data.captions_at(i)[0])
        if len(found) == run.recipe.preview.rows:
            break
    return list(found)
