"""train(recipe): set a run up, then step through its images.

Shapes in names: N images of a micro-batch, C channels, H x W pixels.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotone.data.batch import Batch, to_device
from duotone.data.refusal import Refused
from duotone.engine import draws, speed
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.distributed import zero
from duotone.engine.objectives.base import Objective
from duotone.engine.outcome import finish, missed, preview_and_validate
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import refuse_unstorable
from duotone.engine.run import Run, plans, save
from duotone.engine.run_folder import set_export_aside
from duotone.engine.set_up import set_up
from duotone.engine.stopping import Interrupted, Stop
from duotone.engine.trace import fingerprints, trace
from duotone.engine.whole_step import WholeStep
from duotone.kernels.diffuse import diffuse


def train(recipe: Recipe) -> Path:
    """Trains a recipe to its last image or its time limit, resuming an interrupted run; returns the run's folder.

    Raises Refused, before anything is written, if the recipe, its data or the run's folder cannot be used, and
    Interrupted if SIGINT or SIGTERM stopped the run, after a checkpoint has been written. After a SIGTERM further ones
    are ignored, so that the process ends with its exit code; a caller that goes on instead sets the handler anew.
    """
    recipe.check()
    refuse_unstorable(recipe)
    began = time.monotonic()
    with ExitStack() as signals, ExitStack() as held:  # left in reverse: `held` is closed first
        held.push(zero.leave)
        run = set_up(recipe, held)
        run.whole_step = whole_step(run)
        batches = run.data.batches(plans(run, run.images))
        if run.ranks.rank == 0 and run.images < recipe.images:
            set_earlier_export_aside(run)
        if run.saved is not None and run.images < recipe.images:
            preview_and_validate(run, **zero.from_rank_0(missed(run) if run.ranks.rank == 0 else None))
        stop = signals.enter_context(Stop(recipe.checkpoint.stop_after, began, run.sharded.device))
        steps(run, batches, stop)
        if run.images < recipe.images:
            interrupt(run, stop)
        else:
            save(run)
            signals.close()  # a signal now ends the process at once; only the export is lost, and a rerun writes it
            finish(run)
    if stop.heard and run.images < recipe.images:
        raise Interrupted(stop.heard)
    return run.recipe.folder


def set_earlier_export_aside(run: Run) -> None:
    """Renames the export of a finished run that is given more images, since it is no longer complete."""
    export = set_export_aside(run.recipe.folder)
    if export is not None:
        run.log.say(f"the run continues past its earlier end: the weights it ended with are now {export}")


def steps(run: Run, batches: Iterator[Batch], stop: Stop) -> None:
    """Trains to the run's last image, or until `stop` is due."""
    recipe = run.recipe
    while run.images < recipe.images:
        with saving_if_refused(run):
            train_step(run, batches)
        if run.due(recipe.checkpoint.every):
            save(run)  # before pictures, which may fail
        due = {"drawn": run.due(recipe.preview.every), "measured": run.due(recipe.validation.every)}
        if any(due.values()) and stop.due(now=True):
            return  # whoever stopped the run may not wait for pictures; they are made when it resumes
        preview_and_validate(run, **due)
        if stop.due():
            return


@contextmanager
def saving_if_refused(run: Run) -> Iterator[None]:
    """Saves the steps before a refused sample: on a single rank only, since other ranks would wait inside the step."""
    before = run.images
    try:
        yield
    except Refused:
        run.images = before
        if run.ranks.count == 1 and before > run.began_at:
            save(run)
        raise


def whole_step(run: Run) -> WholeStep | None:
    """What takes each step as one recorded CUDA graph, or None if that was not asked for or is not possible."""
    recipe = run.recipe
    reason = speed.why_not_whole_step(recipe.speed, run.choice, run.sharded.stage, run.ranks.count, recipe.accumulation)
    if reason is None:
        return WholeStep(run.sharded, partial(loss_of, recipe.objective), run.log.say)
    if recipe.speed.whole_step:
        run.log.say(f"speed.whole_step has no effect {reason}")
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
    log_step(run, torch.stack(losses).mean(), learning_rate, traced)


def log_step(run: Run, loss: Tensor, learning_rate: float, traced: list[tuple[int, str, str]]) -> None:
    """Logs one step; its numbers, which wait for the device, are computed only when a line is due."""

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
    """One micro-batch, and the update after a step's last; returns the loss and the network's input for the trace."""
    if run.recipe.model.dropout:
        draws.seed_dropout(run.recipe.seed, batch.positions_N)
    if run.whole_step is not None:
        inputs = inputs_of(run, batch)
        return run.whole_step(inputs), inputs["input_NCHW"]
    loss, input_NCHW = micro_step(run, batch)
    run.sharded.step()
    return loss, input_NCHW


def micro_step(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Forward and backward of one micro-batch; returns the loss and the network's input for the trace."""
    inputs = inputs_of(run, batch)
    if run.recipe.speed.cuda_graphs:
        # The outputs of the last replay are no longer needed: their memory may be overwritten.
        torch.compiler.cudagraph_mark_step_begin()
    loss = loss_of(run.recipe.objective, run.sharded, inputs)
    run.sharded.backward(loss)
    return loss, inputs["input_NCHW"]


def loss_of(objective: Objective, network: Callable, inputs: dict) -> Tensor:
    """The mean loss of inputs that are already on the device; nothing here synchronises with the CPU."""
    output_NCHW, log_scale_N = network(*(inputs[name] for name in ("input_NCHW", "time_N", "tensors", "keep")))
    return objective.mean_loss(output_NCHW, inputs["target_NCHW"], inputs["weight_N"], log_scale_N)


def inputs_of(run: Run, batch: Batch) -> dict:
    """The inputs of loss_of, as a tree of tensors on the device."""
    recipe, device = run.recipe, run.sharded.device
    objective, positions_N = recipe.objective, batch.positions_N
    sigma_N = noise_levels(recipe, positions_N)
    input_NCHW, target_NCHW = diffuse(
        to_device(batch.images_NHWC, device),
        to_device(flips(recipe, positions_N), device),
        to_device(objective.coefficients(sigma_N).float(), device),
        recipe.seed,
        to_device(torch.as_tensor(positions_N), device),
        int(draws.Purpose.NOISE),
        dtype=run.choice.dtype,
    )
    tensors, keep = conditions(run, batch)
    return {
        "input_NCHW": input_NCHW,
        "target_NCHW": target_NCHW,
        "time_N": to_device(objective.scalings(sigma_N).noise_N.float(), device),
        "weight_N": to_device(objective.loss_weight(sigma_N).float(), device),
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
    """Each conditioner's tensors and the rows it keeps; the other rows are dropped to the null condition."""
    recipe, device = run.recipe, run.sharded.device
    flip_N = flips(recipe, batch.positions_N)
    tensors, keep = conditioned(run.network.conditioners, batch, recipe.seed, flip_N, recipe.drop_together)
    on_device = {kind: {name: to_device(t, device) for name, t in named.items()} for kind, named in tensors.items()}
    return on_device, {kind: to_device(keep_N, device) for kind, keep_N in keep.items()}


def interrupt(run: Run, stop: Stop) -> None:
    """Saves a checkpoint of the current step, from which the same command resumes."""
    save(run)
    stop.ends_the_process()
    if not stop.heard:
        minutes, images = stop.minutes, f"{run.images:,} of {run.recipe.images:,} images"
        run.log.say(f"stopped after {minutes:g} minutes at {images}: {run.recipe.again} resumes from there")
