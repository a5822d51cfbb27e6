"""An evaluation as a table for the terminal and as pictures."""

from pathlib import Path

import numpy as np

from duotone.engine import pictures
from duotone.engine.evaluate.evaluation import Copies, Evaluation
from duotone.engine.evaluate.images import Images, Splits
from duotone.engine.evaluate.loss_table import WHOLE
from duotone.engine.evaluate.nearest import pairs
from duotone.engine.evaluate.shares import Share

COLUMNS = 10
MEASURES = {"frechet": "Frechet distance", "kernel": "kernel distance", "precision": "precision", "recall": "recall"}


def table(result: Evaluation, splits: Splits) -> str:
    """Lines of text, with every figure beside its floor."""
    blocks = [
        distance_lines(result, splits),
        accuracy_lines(result, splits),
        copy_lines(result, splits),
        loss_lines(result, splits),
    ]
    return "\n\n".join("\n".join(block) for block in blocks if block)


def distance_lines(result: Evaluation, splits: Splits) -> list[str]:
    n = result.settings.real
    lines = [
        f"{result.settings.samples:,} samples, {result.forwards:.1f} forward passes each; features: {result.features}"
    ]
    for name, against in result.distances.items():
        there = {"train": "the training set", "held_out": splits.held_out_said}.get(name, f"the {name} set")
        other = splits.held_out_said if name == "train" else "the training set"
        lines.append(f"  {'from ' + there:34} {'samples':>10} {'real':>10}   (real: {n:,} of {other})")
        for field, title in MEASURES.items():
            made, real = getattr(against.samples, field), getattr(against.real, field)
            times = f"   {made / real:.2f} x" if field == "frechet" and real > 0 else ""
            lines.append(f"    {title:32} {made:10.4g} {real:10.4g}{times}")
    return lines


def accuracy_lines(result: Evaluation, splits: Splits) -> list[str]:
    if result.accuracy is None:
        return []
    said = "seen by the classifier as asked" if result.judged_by == result.asked_by else "seen by the classifier"
    head = f"  {said:34} {'samples':24} real ({splits.held_out_is})"
    if result.judged_by != result.asked_by:
        head += (
            f"   (asked by {result.asked_by}; right if it sees the {result.judged_by} of the images whose {result.asked_by} "
            "were asked for)"
        )
    rows = [("all", result.accuracy, result.judge.accuracy)]
    rows += [(name, share, result.judge.by_name[name]) for name, share in result.by_name.items()]
    return [head, *(accuracy_line(*row) for row in rows)]


def accuracy_line(name: str, made: Share, real: Share) -> str:
    return f"    {name:32} {made!s:24} {real}"


def copy_lines(result: Evaluation, splits: Splits) -> list[str]:
    seen, all_of_them = len(splits.seen), splits.seen.there_are
    some = f"; among {seen:,} of {all_of_them:,} training images: --most" if all_of_them not in (None, seen) else ""
    head = f"  {'closer than 1 % of training pairs':34} {'samples':>10} {'real':>10}   (about 1 % where nothing is copied{some})"
    return [head, *(copy_line(name, copies) for name, copies in result.copies.items())]


def copy_line(name: str, copies: Copies) -> str:
    real = "-" if copies.real is None else f"{copies.real:.1%}"
    smallest = copies.samples.distances_N.min()
    return (
        f"    by {name:29} {copies.samples.closer:10.1%} {real:>10}   (nearest {smallest:.3g}, threshold "
        f"{copies.samples.threshold:.3g})"
    )


def loss_lines(result: Evaluation, splits: Splits) -> list[str]:
    """A row for each noise level: the mean with its interval, then the mean of each class."""
    if not result.losses:
        return []
    sigmas = list(dict.fromkeys(loss.sigma for loss in result.losses))
    names = list(dict.fromkeys(loss.name for loss in result.losses))[:12]
    found = {(loss.sigma, loss.name): loss for loss in result.losses}
    lines = [f"  loss at sigma, {found[sigmas[0], WHOLE].images} images of {splits.held_out_said}, 95 % interval"]
    lines.append(f"  {'sigma':>9}  {WHOLE:24} " + " ".join(f"{name[:10]:>10}" for name in names[1:]))
    for sigma in sigmas:
        whole = found[sigma, WHOLE]
        spread = f"{whole.loss:.4f}" + ("" if whole.low is None else f" [{whole.low:.4f}, {whole.high:.4f}]")
        cells = [f"{found[sigma, name].loss:10.4f}" for name in names[1:]]
        lines.append(f"  {sigma:9.4g}  {spread:24} " + " ".join(cells))
    return lines


# ------------------------------------------------------------------------------------------------------- pictures


def draw(result: Evaluation, splits: Splits, folder: Path) -> list[Path]:
    """Writes samples.png, a row per class, and nearest-*.png, the samples nearest to a training image, each above that image."""
    folder.mkdir(parents=True, exist_ok=True)
    zoom = max(1, 64 // result.samples_NHWC.shape[1])
    written = [folder / "samples.png"]
    pictures.write(written[0], pictures.grid(by_class(result.samples_NHWC, result.asked_for), COLUMNS, zoom=zoom))
    for name, copies in result.copies.items():
        sheet, columns = pairs(result.samples_NHWC, splits.seen.images_NHWC, copies.samples)
        written.append(folder / f"nearest-{name}.png")
        pictures.write(written[-1], pictures.grid(sheet, columns, zoom=zoom))
    return written


def by_class(images_NHWC: np.ndarray, asked_for: Images) -> np.ndarray:
    """Ten images of each class, of at most twelve classes; without labels, the first hundred."""
    labels_N = asked_for.labels_N
    if labels_N is None:
        return images_NHWC[: COLUMNS**2]
    rows = [images_NHWC[labels_N == label][:COLUMNS] for label in np.unique(labels_N)[:12]]
    return np.concatenate([row for row in rows if len(row) == COLUMNS] or [images_NHWC[: COLUMNS**2]])
