"""Sample grids, denoising strips and GIFs of a run, always of the EMA weights, with the same seeds and conditions."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from duotone.data.refusal import Refused
from duotone.engine import pictures
from duotone.engine.artifact import Model
from duotone.engine.conditioning.attributes import states_in
from duotone.engine.pictures import pixels
from duotone.engine.preview import Previews
from duotone.engine.sample import sample
from duotone.engine.sampling.request import listed, number_of_images
from duotone.engine.sampling.steering import Conditions, Steering

NO_FILE_NAME = re.compile(r"[^\w-]+")


@dataclass(frozen=True, kw_only=True)
class Examples:
    """Captions and images of the data, for previews of models that are conditioned on such."""

    captions: tuple[str, ...] = ()
    images_NHWC: np.ndarray | None = None


def asked_for(config: Previews, model: Model, examples: Examples) -> dict[str, list]:
    """The conditions of one column of the grid, as keyword arguments of sample()."""
    rows: dict[str, list] = {}
    asked = {conditioner.keyword for conditioner in model.network.conditioners.values()}
    if "prompts" in asked:
        rows["prompts"] = list(config.prompts or examples.captions)[: config.rows]
    if "labels" in asked:
        rows["labels"] = list(range(len(model.facts.classes)))
        if "prompts" not in asked:
            rows["labels"] = rows["labels"][: max(config.rows, 10)]
    if "attributes" in asked:
        sets = [states_in(text) for text in config.attributes] or [{name: 1} for name in model.facts.attributes]
        rows["attributes"] = sets[: config.rows]
    rows |= {c.keyword: c.values_of(examples.images_NHWC[: config.rows]) for c in spatial(model)}
    for conditioner in model.network.conditioners.values():
        if conditioner.keyword not in rows and (values := conditioner.examples()):
            rows[conditioner.keyword] = list(values)[: config.rows]
    if not rows:
        return {"count": config.rows}
    count = min(len(v) for v in rows.values())
    return {name: v[:count] for name, v in rows.items()}


def refuse_undrawable(config: Previews, model: Model, examples: Examples) -> None:
    """Raises Refused, before the first step, on what would end a run at its first pictures."""
    rows = asked_for(config, model, examples)
    guidance, plain = settings_of(config, model, rows)["guidance"], Steering()
    count = rows.pop("count", None)
    silent = {c.keyword for c in model.network.conditioners.values()} - {*rows, "temperatures"}
    try:
        Conditions.of(model, listed(rows), None, guidance, number_of_images(rows, count), plain)
    except Refused as refusal:
        remedy = f" (its Conditioner's `examples` would be: {', '.join(silent)})" if silent else ""
        raise Refused(f"preview: {refusal}{remedy}") from None


def spatial(model: Model) -> list:
    """The conditioners that take an image."""
    return [conditioner for conditioner in model.network.conditioners.values() if conditioner.spatial]


def given(model: Model, rows: dict) -> list[np.ndarray]:
    """The images that each row is conditioned on, as the network sees them: (rows, H, W, C) for each such condition."""
    channels, size = model.network.unet.config.out_channels, (model.size, model.size)
    found = []
    for conditioner in spatial(model):
        tensors = conditioner.of_values(rows[conditioner.keyword], size)
        keep_N = torch.ones(len(rows[conditioner.keyword]), dtype=torch.bool)
        found.append(pixels(conditioner(tensors, keep_N).channels_NKHW[:, :channels]))
    return found


def beside(given_NHWC: list[np.ndarray], images_NHWC: np.ndarray, columns: int) -> np.ndarray:
    """A grid whose rows begin with the images that they were given."""
    if not given_NHWC:
        return images_NHWC
    rows = images_NHWC.reshape(-1, columns, *images_NHWC.shape[1:])
    whole = np.concatenate([*(g[:, None] for g in given_NHWC), rows], axis=1)
    return whole.reshape(-1, *whole.shape[2:])


def repeated(rows: dict, columns: int) -> dict:
    """Each condition `columns` times in a row."""
    return {k: v * columns if isinstance(v, int) else [x for x in v for _ in range(columns)] for k, v in rows.items()}


def draw(config: Previews, model: Model, examples: Examples, folder: Path, name: str) -> list[Path]:
    """Writes <name>.png and the strips; returns their paths. A row that is given an image starts with it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = asked_for(config, model, examples)
    settings = settings_of(config, model, rows)
    seen = by_step(config, model, config.columns)
    shown_by_step = seen if config.strips else None
    images = sample(model, **repeated(rows, config.columns), **settings, seed=0, on_step=shown_by_step)
    zoom = zoom_of(images)
    written = [folder / f"{name}.png"]
    shown = given(model, rows)
    sheet = pictures.grid(beside(shown, images, config.columns), config.columns + len(shown), zoom=zoom)
    pictures.write(written[0], sheet)
    if config.strips:
        strips = {"conditional": seen.strips(config.columns)}
        if model.can_draw_unconditionally:
            strips["unconditional"] = unconditional_strip(config, model, len(images) // config.columns, settings)
        for kind, images in strips.items():
            written.append(folder / f"{name}-{kind}.png")
            pictures.write(written[-1], pictures.grid(images, config.columns, zoom=zoom))
        written.append(folder / f"{name}.gif")
        pictures.save_gif(written[-1], frames_of(strips["conditional"], config.columns, zoom), milliseconds=200)
    return written


def settings_of(config: Previews, model: Model, rows: dict) -> dict:
    """Steps, sampler and guidance scale for these conditions, as keyword arguments of sample()."""
    guidance = config.guidance if model.can_be_guided and "count" not in rows else 1.0
    return {"steps": config.steps, "sampler": config.sampler, "guidance": guidance}


def draw_sheets(config: Previews, model: Model, folder: Path) -> list[Path]:
    """Writes class-<number>-<name>.png, a sheet of each class, if labels are the model's only condition."""
    if {conditioner.keyword for conditioner in model.network.conditioners.values()} != {"labels"}:
        return []
    written = []
    for label, name in enumerate(model.facts.classes):
        rows = {"labels": [label] * (config.rows * config.columns)}
        images = sample(model, **rows, **settings_of(config, model, rows), seed=0)
        written.append(folder / f"class-{label:03d}-{NO_FILE_NAME.sub('-', name)[:100]}.png")
        pictures.write(written[-1], pictures.grid(images, config.columns, zoom=zoom_of(images)))
    return written


def zoom_of(images_NHWC: np.ndarray) -> int:
    """The factor that makes small images large enough to look at."""
    return max(1, 64 // images_NHWC.shape[1])


def frames_of(strip_NHWC: np.ndarray, moments: int, zoom: int) -> list:
    """The frames of a film of the generation: the moments of a strip in turn, its rows side by side."""
    film = strip_NHWC.reshape(-1, moments, *strip_NHWC.shape[1:])
    return [pictures.grid(film[:, i], min(8, len(film)), zoom=zoom) for i in range(moments)]


def film_of_grids(folder: Path) -> Path | None:
    """The grids of a run, one after another, as previews/training.gif; None before the second."""
    grids = pictures.opened(sorted(path for path in folder.glob("images-*.png") if path.stem.count("-") == 1))
    if len(grids) < 2:
        return None
    pictures.save_gif(folder / "training.gif", grids, milliseconds=300)
    return folder / "training.gif"


def by_step(config: Previews, model: Model, columns: int) -> pictures.ByStep:
    """Collects the first image of each row at every step."""
    return pictures.ByStep(model.objective.falling_sigmas(config.steps) if config.noisy else None, columns)


def unconditional_strip(config: Previews, model: Model, rows: int, settings: dict) -> np.ndarray:
    """A strip drawn without a condition, from the first noise of each row."""
    seen, seeds = by_step(config, model, 1), [(0, row * config.columns) for row in range(rows)]
    sample(model, count=rows, **settings | {"guidance": 1.0}, seed=seeds, on_step=seen)
    return seen.strips(config.columns)
