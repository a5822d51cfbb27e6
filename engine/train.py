"""train(recipe): set up, then the loop.

N images of a micro-batch, C channels, H x W pixels.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotone.data.batch import Batch, sent
from duotone.data.refusal import Refused
from duotone.engine import draws, speed
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.distributed import zero
from duotone.engine.objectives.base import Objective
from duotone.engine.outcome import finish, look, missed
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import refuse_unstorable
from duotone.engine.run import Run, plans, save
from duotone.engine.run_folder import reopen
from duotone.engine.set_up import set_up
from duotone.engine.stopping import Interrupted, Stop
from duotone.engine.trace import fingerprints, trace
from duotone.engine.whole_step import WholeStep
from duotone.kernels.diffuse import diffuse


def train(recipe: Recipe) -> Path:
    """Runs a recipe to its end, or on from where it stopped, or until its minutes are over; returns the run's folder.

    Raises Refused on a recipe, data or run folder that cannot be used, before anything is written, and Interrupted
    after the checkpoint with which SIGINT or SIGTERM ends it.
    """
    recipe.check()
    refuse_unstorable(recipe)
    began = time.monotonic()
    with ExitStack() as signals, ExitStack() as held:  # what is held is closed first
        held.push(zero.leave)
        run = set_up(recipe, held)
        run.whole_step = whole_step(run)
        batches = run.data.batches(plans(run, run.images))
        if run.ranks.rank == 0 and run.images < recipe.images:
            go_on_past_the_end(run)
        if run.saved is not None and run.images < recipe.images:
            look(run, **zero.from_rank_0(missed(run) if run.ranks.rank == 0 else None))
        stop = signals.enter_context(Stop(recipe.checkpoint.stop_after, began, run.sharded.device))
        steps(run, batches, stop)
        if run.images < recipe.images:
            interrupt(run, stop)
        else:
            save(run)
            signals.close()  # from here on they end it at once, and lose nothing but the export, which the same command makes
            finish(run)
    if stop.heard and run.images < recipe.images:
        raise Interrupted(stop.heard)
    return run.recipe.folder


def go_on_past_the_end(run: Run) -> None:
    """A run with more images than before is complete no longer."""
    export = reopen(run.recipe.folder)
    if export is not None:
        run.log.say(f"the run goes on past its end: the weights that it ended with are now {export}")


def steps(run: Run, batches: Iterator[Batch], stop: Stop) -> None:
    """To the run's last image, or until it is to stop."""
    recipe = run.recipe
    while run.images < recipe.images:
        with keeping(run):
            train_step(run, batches)
        if run.due(recipe.checkpoint.every):
            save(run)  # before pictures, which may fail
        due = {"drawn": run.due(recipe.preview.every), "measured": run.due(recipe.validation.every)}
        if any(due.values()) and stop.due(now=True):
            return  # who ends the run may not wait for pictures; where it goes on they are made up for
        look(run, **due)
        if stop.due():
            return


@contextmanager
def keeping(run: Run) -> Iterator[None]:
    """A sample that is refused loses no step before it: a single rank saves them, of several the others wait for this one."""
    before = run.images
    try:
        yield
    except Refused:
        run.images = before
        if run.ranks.count == 1 and before > run.began_at:
            save(run)
        raise


def whole_step(run: Run) -> WholeStep | None:
    """Steps as one recording each, where that was asked for and holds."""
    recipe = run.recipe
    held = speed.what_keeps_a_step_apart(
        recipe.speed, run.choice, run.sharded.stage, run.ranks.count, recipe.accumulation
    )
    if held is None:
        return WholeStep(run.sharded, partial(loss_of, recipe.objective), run.log.say)
    if recipe.speed.whole_step:
        run.log.say(f"speed.whole_step has no effect {held}")
    return None


def train_step(run: Run, batches: Iterator[Batch]) -> None:
    """One optimizer step: `accumulation` micro-batches on every rank, then the update of weights and EMA."""
    recipe = run.recipe
    learning_rate = recipe.optimizer.lr_at(run.images, recipe.images)
    run.images += recipe.batch_size
    run.sharded.optimizer.set(lr=learning_rate, ema_decay=recipe.ema.decay(run.images, recipe.batch_size))
    losses, traced = [], []
    for _ in range(recipe.accumulation):
        waiting = time.monotonic()
        batch = next(batches)
        run.log.waited(time.monotonic() - waiting)
        loss, input_NCHW = whole_or_micro_step(run, batch)
        losses.append(loss.detach())
        if recipe.log.trace:
            traced += fingerprints(batch, input_NCHW)
    if run.steps_here == 2:
        run.graphs_before = speed.compiled_graphs()
    tell(run, torch.stack(losses).mean(), learning_rate, traced)


def tell(run: Run, loss: Tensor, learning_rate: float, traced: list[tuple[int, str, str]]) -> None:
    """A step's numbers, where they are due: each waits for the device."""

    def numbers() -> dict[str, float]:
        return {
            "loss": zero.mean(loss).item(),
            "grad_norm": run.sharded.grad_norm(),
            "learning_rate": learning_rate,
            "skipped": run.sharded.skipped,
        }

    if run.recipe.log.trace:
        trace(run, traced, zero.mean(loss).item())
    run.log.step(run.step, run.images, run.recipe.batch_size, numbers)


def whole_or_micro_step(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """A micro-batch and, with the last of them, the update: the loss, and the network's input for the trace."""
    if run.recipe.model.dropout:
        draws.seed_dropout(run.recipe.seed, batch.positions_N)
    if run.whole_step is not None:
        inputs = inputs_of(run, batch)
        return run.whole_step(inputs), inputs["input_NCHW"]
    loss, input_NCHW = micro_step(run, batch)
    run.sharded.step()
    return loss, input_NCHW


def micro_step(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Forward and backward of one micro-batch: the loss, and the network's input for the trace."""
    inputs = inputs_of(run, batch)
    if run.recipe.speed.cuda_graphs:
        # What the last replay left behind is used up: its memory may be written again.
        torch.compiler.cudagraph_mark_step_begin()
    loss = loss_of(run.recipe.objective, run.sharded, inputs)
    run.sharded.backward(loss)
    return loss, inputs["input_NCHW"]


def loss_of(objective: Objective, network: Callable, inputs: dict) -> Tensor:
    """Of inputs that lie on the device already: nothing here asks the CPU."""
    output_NCHW, log_scale_N = network(*(inputs[name] for name in ("input_NCHW", "time_N", "tensors", "keep")))
    return objective.mean_loss(output_NCHW, inputs["target_NCHW"], inputs["weight_N"], log_scale_N)


def inputs_of(run: Run, batch: Batch) -> dict:
    """All that loss_of takes, on the device: a tree of tensors."""
    recipe, device = run.recipe, run.sharded.device
    objective, positions_N = recipe.objective, batch.positions_N
    sigma_N = noise_levels(recipe, positions_N)
    input_NCHW, target_NCHW = diffuse(
        sent(batch.images_NHWC, device),
        sent(flips(recipe, positions_N), device),
        sent(objective.coefficients(sigma_N).float(), device),
        recipe.seed,
        sent(torch.as_tensor(positions_N), device),
        int(draws.Purpose.NOISE),
        dtype=run.choice.dtype,
    )
    tensors, keep = conditions(run, batch)
    return {
        "input_NCHW": input_NCHW,
        "target_NCHW": target_NCHW,
        "time_N": sent(objective.scalings(sigma_N).noise_N.float(), device),
        "weight_N": sent(objective.loss_weight(sigma_N).float(), device),
        "tensors": tensors,
        "keep": keep,
    }


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
    on_device = {kind: {name: sent(t, device) for name, t in named.items()} for kind, named in tensors.items()}
    return on_device, {kind: sent(keep_N, device) for kind, keep_N in keep.items()}


def interrupt(run: Run, stop: Stop) -> None:
    """A checkpoint where the run stands, for the same command to go on from."""
    save(run)
    stop.ends_the_process()
    if not stop.heard:
        minutes, images = stop.minutes, f"{run.images:,} of {run.recipe.images:,} images"
        run.log.say(f"stopped after {minutes:g} minutes at {images}: {run.recipe.again} goes on from there")
