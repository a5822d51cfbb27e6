"""From a recipe to a run about to take its first step: what can be refused is refused before anything is written."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.data.shards import Dataset
from duotone.data.whole_file import write_json
from duotone.engine import artifact, checkpoint, draws, probe, run_folder, speed
from duotone.engine.conditioning.base import Facts
from duotone.engine.distributed import agreement, zero
from duotone.engine.distributed.sharded import Sharded
from duotone.engine.drawing import Examples, refuse_undrawable
from duotone.engine.evaluate.images import Images, read_images
from duotone.engine.exchange.starting_weights import begin_from
from duotone.engine.log import Logger, say
from duotone.engine.memory import Estimate, estimate, fewest_micro_batches
from duotone.engine.model.network import Network
from duotone.engine.recipe import Objectives, Recipe
from duotone.engine.recipe_json import differences, to_json
from duotone.engine.run import Run, changes_on_resume, resume
from duotone.kernels.self_test import self_test


def set_up(recipe: Recipe, held: ExitStack) -> Run:
    """Does everything before the first step, and returns the run; `held` closes what is opened here.

    Raises Refused if the recipe, the data or the run's folder cannot be used.
    """
    # The recipe: by itself, on this machine, then across all ranks.
    recipe = recipe.placed()
    choice = speed.choose(recipe.speed, recipe.zero.stage)
    speed.set_up(recipe.speed, choice)
    stored = recipe_before(recipe)
    refuse_other_run(recipe, stored)
    recipe.micro_batch(zero.world_size())
    ranks = zero.join(choice.device)
    stored = zero.from_rank_0(stored)
    zero.refuse_precision(choice.precision)
    agreement.check_recipe(recipe, choice, ranks)
    faults = kernel_faults(ranks, recipe.speed)  # before any kernel runs: trying a micro-batch below runs them too

    # The data, the network, and what each needs from the other.
    recipe, data, held_out = open_data(recipe, stored, ranks, held)
    unlike = agreement.check_data(data, ranks)
    facts = Facts(classes=as_tuple(data.classes), attributes=as_tuple(data.attributes))
    recipe.preview.check_names(facts)
    network, found, begun = initial_network(recipe, facts, ranks)
    agreement.check_frozen(network, ranks)
    examples = examples_of(data, recipe, network)  # before the reading thread starts: a decoder serves one reader only
    refuse_undrawable(recipe.preview, artifact.Model(network, recipe.objective, facts, recipe), examples)
    measured = measured_objective(recipe, data, found, ranks)

    # How it is run.
    blocks = speed.make_ready(network.unet, recipe.speed, choice)
    recipe = with_accumulation(recipe, stored, network, choice, ranks)
    micro = recipe.micro_batch(ranks.count)
    predicted = estimate(network, recipe, micro, choice, ranks.count)

    # From here on files are written; only what other ranks or a checkpoint turn out to hold can still be refused.
    with zero.rank_0_first(ranks):
        if ranks.rank == 0:
            begin_folder(recipe, stored, data.count, held, goes_on=found is not None)
    unlike += agreement.check_folder(recipe.folder, ranks)
    recipe = replace(recipe, objective=measured)
    if blocks:
        say(f"compiling {blocks} blocks on first use")
    sharded = start_sharded(recipe, network, choice, micro)
    held.push(sharded.close)
    run = Run(recipe, choice, ranks, data, facts, network, sharded, held_out=held_out, examples=examples)
    begun = [*begun, *unlike]
    if found is not None:
        begun = [*begun, resume(run, found), *changes_on_resume(run)]
        if ranks.rank == 0 and stored["images"] != recipe.images:
            write_json(recipe.folder / "recipe.json", stored | {"images": recipe.images})
    run.began_at = run.images
    run.log = Logger(
        recipe.log, recipe.folder, recipe.images, run.images, speaks=ranks.rank == 0, recipe=to_json(recipe)
    )
    held.callback(run.log.close)
    announce(run, predicted, begun, faults)
    return run


def open_data(
    recipe: Recipe, stored: dict | None, ranks: zero.Ranks, held: ExitStack
) -> tuple[Recipe, Dataset, Images | None]:
    """The recipe with its data located, the opened data, and on rank 0 the held-out images to measure the loss on."""
    with zero.rank_0_first(ranks):
        if ranks.rank == 0 and stored is not None:
            claim(recipe, stored, held)  # before one of the folder's checkpoints is chosen
        recipe = with_embedded_data(recipe)
        data = recipe.data.open(ranks.device, require_captions=recipe.wants_captions)
        held.callback(data.close)
        held_out = validation_images(recipe) if ranks.rank == 0 else None
    return recipe, data, held_out


def validation_images(recipe: Recipe) -> Images | None:
    """The images of every validation, or None without validation; raises Refused if the data holds none out."""
    if not recipe.validation.every:
        return None
    return read_images(recipe.data, recipe.validation.images, "validation set", "held out")


def initial_network(recipe: Recipe, facts: Facts, ranks: zero.Ranks) -> tuple[Network, Path | None, list[str]]:
    """The network before the first step, the checkpoint to resume from (or None), and lines for the log about both."""
    torch.manual_seed(recipe.seed)
    network = artifact.build(recipe, facts)
    found, said = newest_checkpoint(recipe, ranks)
    if recipe.start is not None and found is None:
        said = said + begin_from(network, recipe.start, recipe.model, recipe.objective, recipe.conditioning, facts)
    return network.to(ranks.device), found, said


def measured_objective(recipe: Recipe, data: Dataset, found: Path | None, ranks: zero.Ranks) -> Objectives:
    """The objective, with the values it takes from the data: rank 0 measures them once; a resumed run keeps them."""
    if found is not None:
        return artifact.recipe_of(found / "ema.safetensors").objective
    with zero.rank_0_first(ranks):
        fitted = recipe.objective.fitted(data) if ranks.rank == 0 else None
    return zero.from_rank_0(fitted)


def recipe_before(recipe: Recipe) -> dict | None:
    """The stored recipe of the run that this one resumes, or None for a new run."""
    if recipe.fresh:
        run_folder.refuse_foreign_folder(recipe.folder)
        return None
    return run_folder.stored_recipe(recipe.folder)


def newest_checkpoint(recipe: Recipe, ranks: zero.Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to resume from, chosen by rank 0 and seen by all ranks, and a line for each one passed over."""
    if recipe.fresh:
        return None, []
    with zero.rank_0_first(ranks):
        chosen = checkpoint.newest(recipe.folder / "checkpoints") if ranks.rank == 0 else None
    found, passed_over = zero.from_rank_0(chosen)
    fault = None if found is None or ranks.rank == 0 else checkpoint.verify(found)
    if fault is not None:
        raise Refused(f"{found} is not the same here as on rank 0 ({fault}): all ranks must share one --out")
    return found, passed_over


def with_accumulation(recipe: Recipe, stored: dict | None, network: Network, choice, ranks: zero.Ranks) -> Recipe:
    """The recipe with its number of micro-batches: its own, or the fewest that fit on every rank.

    A resumed run takes at least as many as before, if its batch still divides by them; it may have had more or larger
    ranks. The estimate proposes a number, and two real steps decide."""
    if recipe.accumulation is not None:
        return recipe
    before = (stored or {}).get("accumulation") or 1
    least = before if recipe.batch_size % (ranks.count * before) == 0 else 1
    if choice.device == "cpu":
        return replace(recipe, accumulation=least)
    room = min(zero.gathered([torch.cuda.get_device_properties(ranks.device).total_memory]))
    times = fewest_micro_batches(network, recipe, choice, ranks.count, room, least)
    while not all(zero.gathered([tried(network, recipe, times, choice, ranks.count)])):
        times = fewest_micro_batches(network, recipe, choice, ranks.count, room, least=times + 1)
    return replace(recipe, accumulation=times)


def tried(network: Network, recipe: Recipe, times: int, choice: speed.Choice, ranks: int) -> bool:
    micro = recipe.batch_size // ranks // times
    needed = estimate(network, recipe, micro, choice, ranks)
    return probe.fits(network.unet, recipe.data.size, micro, needed, recipe.speed, choice)


def start_sharded(recipe: Recipe, network: Network, choice: speed.Choice, micro: int) -> Sharded:
    for module in network.frozen_modules:
        module.to(choice.dtype)  # DeepSpeed casts trained modules only
    return Sharded(
        network,
        recipe.optimizer.build(network),
        zero.settings(
            recipe.zero,
            batch=recipe.batch_size,
            micro=micro,
            accumulation=recipe.accumulation,
            precision=choice.precision,
            clip=recipe.optimizer.clip,
            recorded=speed.records_blocks(recipe.speed, choice),
        ),
    )


def examples_of(data: Dataset, recipe: Recipe, network: Network) -> Examples:
    """The first distinct captions of the data, and its first images if a condition is made from images."""
    images_NHWC = None
    if any(conditioner.spatial for conditioner in network.conditioners.values()):
        positions_N = np.arange(min(data.count, recipe.preview.rows))
        images_NHWC = data.read(draws.plan(recipe.seed, positions_N, data.count)).images_NHWC.cpu().numpy()
    return Examples(captions=some_captions(data, recipe) if data.has_captions else (), images_NHWC=images_NHWC)


def some_captions(data: Dataset, recipe: Recipe) -> tuple[str, ...]:
    """The first distinct captions; an unreadable sample is skipped if training would replace it, else refused."""
    found: dict[str, None] = {}
    for i in np.flatnonzero(data.good_N)[: 20 * recipe.preview.rows]:
        try:
            found.setdefault(data.captions_at(i)[0])
        except Refused:
            if recipe.data.on_bad == "refuse":
                raise
        if len(found) == recipe.preview.rows:
            break
    return tuple(found)


def refuse_other_run(recipe: Recipe, stored: dict | None) -> None:
    changed = [] if stored is None else differences(stored, recipe)
    if changed:
        raise Refused(
            f"{recipe.folder} holds another run ({'; '.join(changed)}): give another --out, or --fresh to move it aside"
        )


def begin_folder(recipe: Recipe, stored: dict | None, samples: int, held: ExitStack, *, goes_on: bool) -> None:
    if stored is None:
        if recipe.fresh:
            run_folder.move_aside(recipe.folder)
        claim(recipe, stored, held)
    if not goes_on:  # nothing is trained yet, so paths and data may differ from those of an earlier start
        write_json(recipe.folder / "recipe.json", to_json(replace(recipe, fresh=False)))  # this marks a run's folder
    if recipe.data.held_out and not (goes_on and (recipe.folder / "splits.json").exists()):
        split = {"training": samples, "held_out": recipe.data.held_out_keys()}
        write_json(recipe.folder / "splits.json", split)


def claim(recipe: Recipe, stored: dict | None, held: ExitStack) -> None:
    """Claims the folder for this process; raises Refused if its stored recipe has changed since it was read."""
    held.enter_context(run_folder.claimed(run_folder.made(recipe.folder)))
    if run_folder.stored_recipe(recipe.folder) != stored:
        raise Refused(f"{recipe.folder}: another process began a run there while this one started; start it again")


def with_embedded_data(recipe: Recipe) -> Recipe:
    """Gives a recipe without shards the embedded captioned shapes, written once as shards beside the run's folder."""
    if recipe.data.shards is not None:
        return recipe
    folder = recipe.folder.parent / f"captioned_shapes-{recipe.data.size}px"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            captioned_shapes.write(folder, count=4096, size=recipe.data.size, seed=0)
        except Refused:
            if not folder.is_dir():  # otherwise another run, started at the same time, has written it
                raise
    return replace(recipe, data=replace(recipe.data, shards=folder))


def as_tuple(names: list[str] | None) -> tuple[str, ...] | None:
    return None if names is None else tuple(names)


def kernel_faults(ranks: zero.Ranks, switches: speed.Speed) -> list[str]:
    """On a GPU, checks every kernel once against its definition; one that disagrees is switched off, with a line."""
    if ranks.device.type == "cpu":
        return []
    mine = self_test(ranks.device, switches.norms_in_turns, switches.norms_join_skips)
    return sorted(set(zero.gathered(mine)))


def announce(run: Run, predicted: Estimate, begun: list[str], faults: list[str]) -> None:
    """Logs the plan in one line, then one line for each substitution."""
    recipe, choice = run.recipe, run.choice
    parameters = sum(p.numel() if not hasattr(p, "ds_numel") else p.ds_numel for p in run.network.parameters())
    micro = recipe.micro_batch(run.ranks.count)
    stage, why = zero.stage_taken(
        recipe.zero, choice.precision, recipe.accumulation, speed.records_blocks(recipe.speed, choice)
    )
    fused, sites = speed.kernel_sites(run.network, run.ranks.device)
    run.log.say(
        f"{recipe.name}: {parameters / 1e6:.1f} M parameters, {choice}, batch {recipe.batch_size} = {micro} x {recipe.accumulation} "
        f"accumulations x {run.ranks.count} ranks, ZeRO-{stage}, about {predicted.gib:.1f} GiB per rank, "
        f"fused kernels at {fused} of {sites} sites, {run.data.count:,} samples decoded by {run.data.decoder}, {recipe.images:,} images = {recipe.images // recipe.batch_size:,} steps"
    )
    substituted = [why, run.data.decoder_note, *run.data.notes, *speed.substitutions(recipe.speed, choice), *faults]
    substituted.append(unguided(run))
    run.notes = [line for line in substituted if line]
    for line in [*begun, *run.notes]:
        run.log.say(line)


def unguided(run: Run) -> str | None:
    """Why previews are not drawn with the guidance scale that was asked for, or None if they are."""
    model = artifact.Model(run.network, run.recipe.objective, run.facts, run.recipe)
    if run.recipe.preview.guidance == 1 or not run.recipe.conditioning or model.can_be_guided:
        return None
    return f"pictures are drawn unguided, not with preview.guidance = {run.recipe.preview.guidance:g}: no null condition is trained"
