"""The loss at each noise level and for each class, with fixed random draws, so that two models can be compared image by image.

N images of H x W pixels and C channels, L noise levels.
"""

import statistics
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotone.engine import draws
from duotone.engine.artifact import Model
from duotone.engine.evaluate.images import Images
from duotone.engine.evaluate.progress import Progress
from duotone.engine.evaluate.shares import student
from duotone.engine.memory import in_chunks
from duotone.kernels.diffuse import diffuse

CHUNK = 64
WHOLE = "all"
"""Name of the row for all images together; a class of that name gets another."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The mean loss in one cell of the table, and its 95 % interval over images."""

    sigma: float
    name: str
    """A class, or WHOLE."""
    loss: float
    low: float | None
    """None if there are too few images for an interval."""
    high: float | None
    images: int


def loss_table(model: Model, images: Images, *, levels: int = 8, seed: int = 1) -> list[Loss]:
    """The training loss, weighted as in training and with every condition given, at equally likely noise levels.

    Level l is the quantile (l + 1/2) / L of the training distribution. There, image i draws the noise of position l N + i.
    """
    u_L = (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    sigma_L = model.objective.draw_sigma(u_L)
    progress = Progress("losses", levels * len(images))
    rows = []
    for level, sigma in enumerate(sigma_L):
        loss_N = losses(model, images, sigma, level * len(images), seed)
        rows += cells(sigma.item(), loss_N, images)
        progress.at((level + 1) * len(images))
    return rows


@torch.inference_mode()
def losses(model: Model, images: Images, sigma: Tensor, first: int, seed: int) -> np.ndarray:
    """The loss of each image at one noise level, (N,)."""

    def some(rows: slice) -> np.ndarray:
        return losses_of(model, images, rows, sigma, first, seed).double().cpu().numpy()

    return in_chunks(some, len(images), CHUNK)


def losses_of(model: Model, images: Images, rows: slice, sigma: Tensor, first: int, seed: int) -> Tensor:
    objective, device = model.objective, model.device
    batch = images.batch(rows, device)
    n = len(batch.keys)
    sigma_N = sigma.expand(n)
    input_NCHW, target_NCHW = diffuse(
        batch.images_NHWC,
        torch.zeros(n, dtype=torch.bool, device=device),
        objective.coefficients(sigma_N).float().to(device),
        seed,
        torch.as_tensor(first + batch.positions_N).to(device),
        int(draws.Purpose.NOISE),
        dtype=model.network.dtype,
    )
    output_NCHW = model.network.predict(
        input_NCHW, objective.scalings(sigma_N).noise_N.float().to(device), conditions_of(model, batch, n, seed)
    )
    return objective.loss_weight(sigma_N).float().to(device) * objective.penalty(output_NCHW, target_NCHW)


def conditions_of(model: Model, batch, n: int, seed: int):
    """Every condition that the data gives, none dropped; a temperature is set to plain conditional prediction."""
    device, tensors, keep = model.device, {}, {}
    for kind, conditioner in model.network.conditioners.items():
        tensors[kind] = {name: t.to(device) for name, t in conditioner.of_batch_whole(batch, seed).items()}
        keep[kind] = torch.full((n,), kind != "temperature", device=device)
    return model.network.condition(tensors, keep)


def cells(sigma: float, loss_N: np.ndarray, images: Images) -> list[Loss]:
    """One row of the table: the cell of all images, then one for each class."""
    found = [cell(sigma, WHOLE, loss_N)]
    if images.labels_N is not None:
        names = images.classes or tuple(str(k) for k in range(int(images.labels_N.max()) + 1))
        names = [f"{name} (class)" if name == WHOLE else name for name in names]
        found += [cell(sigma, name, loss_N[images.labels_N == k]) for k, name in enumerate(names)]
    return [c for c in found if c.images]


def cell(sigma: float, name: str, loss_N: np.ndarray) -> Loss:
    n = len(loss_N)
    mean = float(loss_N.mean()) if n else 0.0
    quantile = student(n)
    if quantile is None:
        return Loss(sigma=sigma, name=name, loss=mean, low=None, high=None, images=n)
    half = quantile * float(loss_N.std(ddof=1)) / n**0.5
    return Loss(sigma=sigma, name=name, loss=mean, low=mean - half, high=mean + half, images=n)


def summary(cells: list[Loss]) -> dict:
    """A row of validation.jsonl: the mean loss, each level's with its 95 % interval over images, and the mean of each class."""
    levels = [cell for cell in cells if cell.name == WHOLE]
    names = dict.fromkeys(cell.name for cell in cells if cell.name != WHOLE)
    return {
        "loss": statistics.mean(cell.loss for cell in levels),
        "levels": [{name: getattr(cell, name) for name in ("sigma", "loss", "low", "high")} for cell in levels],
        "classes": {name: statistics.mean(cell.loss for cell in cells if cell.name == name) for name in names},
    }
