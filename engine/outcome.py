"""What a run produces on its way and at its end: pictures and losses of the EMA weights, the export, the record."""

from pathlib import Path

from torch import Tensor

from duotone.data.whole_file import write_json
from duotone.engine import artifact, drawing, model_card, speed
from duotone.engine.checkpoint import name_of
from duotone.engine.distributed import zero
from duotone.engine.evaluate.loss_table import loss_table, summary
from duotone.engine.run import Run, unread_samples
from duotone.kernels import attention_backends
from duotone.kernels.dispatch import fallbacks


def preview_and_validate(run: Run, drawn: bool, measured: bool) -> None:
    """Draws pictures and measures losses of the EMA weights, which are gathered once for both."""
    if not drawn and not measured:
        return
    ema = run.sharded.gather("ema")
    if run.ranks.rank == 0:
        model = averaged(run, ema)
        if drawn:
            draw(run, model)
        if measured:
            validate(run, model)
    zero.wait()


def missed(run: Run) -> dict[str, bool]:
    """Whether pictures or losses due at the resumed checkpoint are missing: the checkpoint is written before them."""
    recipe, folder = run.recipe, run.recipe.folder
    last = folder / "previews" / f"{name_of(run.images)}.{'gif' if recipe.preview.strips else 'png'}"
    return {
        "drawn": run.due(recipe.preview.every) and not last.exists(),
        "measured": run.due(recipe.validation.every) and not run.log.measured(run.images),
    }


def draw(run: Run, model: artifact.Model) -> list[Path]:
    folder = run.recipe.folder / "previews"
    written = drawing.draw(run.recipe.preview, model, run.examples, folder, name_of(run.images))
    drawing.film_of_grids(folder)
    run.log.drawn(run.images, written)
    return written


def validate(run: Run, model: artifact.Model) -> None:
    if run.held_out is not None:
        cells = loss_table(model, run.held_out, levels=run.recipe.validation.levels)
        run.log.validated({"images": run.images, **summary(cells)})


def averaged(run: Run, ema: dict[str, Tensor]) -> artifact.Model:
    """A model of the EMA weights, in a copy of the network."""
    network = artifact.build(run.recipe, run.facts)
    artifact.fill(network, ema, run.recipe.folder)
    network.eval().requires_grad_(False).to(run.ranks.device, run.choice.dtype)
    return artifact.Model(network, run.recipe.objective, run.facts, run.recipe, run.images)


def finish(run: Run) -> None:
    """Writes what follows the last checkpoint: export, record, model card, pictures and losses."""
    ema = run.sharded.gather("ema")
    unread = unread_samples(run)
    if run.ranks.rank == 0:
        path = run.recipe.folder / "ema.safetensors"
        artifact.save(path, ema, run.recipe, run.facts, run.images)
        told = run.recipe.folder / "record.json"
        if run.steps_here or not told.exists():  # it describes the training, not a later start that trained nothing
            write_json(told, record(run) | {"unread_samples": unread})
        model_card.write(run.recipe.folder / "MODEL_CARD.md", run.recipe, run.facts, run.data, run.images)
        model = averaged(run, ema)
        written = draw(run, model)
        if run.recipe.preview.sheets:
            written += drawing.draw_sheets(run.recipe.preview, model, written[0].parent)
        validate(run, model)
        run.log.say(f"done: EMA weights in {path}, pictures in {written[0].parent}")
    zero.wait()


def record(run: Run) -> dict:
    """How the run was executed: every substitution, graph breaks and recompilations."""
    return {
        "images": run.images,
        "device": run.choice.device,
        "precision": run.choice.precision,
        "ranks": run.ranks.count,
        "decoder": run.data.decoder,
        "fallbacks": fallbacks(),
        "attention_choices": attention_backends.choices(),
        "parts": run.parts,
        "notes": run.notes,
        "graph_breaks": speed.graph_breaks(),
        "recompiles_after_step_2": speed.compiled_graphs() - run.graphs_before if run.steps_here > 2 else 0,
    }
