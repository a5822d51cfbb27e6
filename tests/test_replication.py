"""Paired replication: a published loop in diffusers and torch beside our recipe, on the same draws, loss against loss.

The published side is written here from the papers and notebooks: diffusers' UNet2DModel, their scheduler or the EDM
equations, torch's Adam, plain PyTorch. It is fed our sample order, noise, noise levels and drops, and our initial weights.
"""

import json
import runpy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from duotone.data.shards import Shards
from duotone.engine import artifact, diffusers_folder, draws
from duotone.engine.conditioning.base import Facts
from duotone.engine.log import Log
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.train import train

ROOT = Path(__file__).parent.parent
FASHION = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture(scope="module")
def clothes(tmp_path_factory):
    if not FASHION.exists():
        pytest.skip("Fashion-MNIST is not here: apt-get install dataset-fashion-mnist")
    from duotone.data.prepare.idx import PrepareIdx

    out = tmp_path_factory.mktemp("clothes") / "shards"
    images, labels = (FASHION / f"train-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1"))
    PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=out, limit=2000).run()
    return out


def recipe_of(name: str, shards: Path, out: Path, steps: int, batch: int) -> Recipe:
    """The recipe as it is, with fewer images and a smaller batch."""
    recipe = runpy.run_path(str(ROOT / "recipes" / f"{name}.py"), run_name="recipe")["recipe"]
    return replace(
        recipe,
        data=replace(recipe.data, shards=shards),
        batch_size=batch,
        images=steps * batch,
        checkpoint=replace(recipe.checkpoint, every=0),
        preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
        log=Log(every=1),
        speed=replace(recipe.speed, threads=1),
        out=out,
    )


def our_losses(recipe: Recipe) -> list[float]:
    train(recipe)
    return [json.loads(line)["loss"] for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


class Draws:
    """What our run draws, position by position, as plain tensors."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.data = recipe, recipe.data.open(torch.device("cpu"))

    def __iter__(self):
        seed, batch = self.recipe.seed, self.recipe.batch_size
        for first in range(0, self.recipe.images, batch):
            positions = np.arange(first, first + batch)
            read = self.data.read(draws.plan(seed, positions, self.data.count))
            x = read.images_NHWC.permute(0, 3, 1, 2).float() / 255 * 2 - 1
            noise = draws.normal(seed, positions, draws.Purpose.NOISE, x[0].numel())
            noise = noise.view(batch, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2).contiguous()
            u = draws.uniform(seed, positions, draws.Purpose.SIGMA)[:, 0]
            dropped = draws.uniform(seed, positions, draws.Purpose.DROP)[:, 0]
            yield x, read.labels_N, noise, u, dropped


def initial(recipe: Recipe) -> artifact.Network:
    """Our network as a run of the recipe begins."""
    data = recipe.data.open(torch.device("cpu"))
    torch.manual_seed(recipe.seed)
    return artifact.build(recipe, Facts(classes=tuple(data.classes)))


def their_unet(recipe: Recipe, classes: int | None, layout: torch.memory_format):
    from diffusers import UNet2DModel

    theirs = diffusers_folder.to_config(recipe.model, recipe.data.size, classes)
    assert theirs.pop("_class_name") == "UNet2DModel"
    return UNet2DModel(**theirs).to(memory_format=layout)


def notebook_losses(recipe: Recipe, layout: torch.memory_format = torch.contiguous_format) -> list[float]:
    """diffusion-models-class, unit 2: the class embedded in four channels beside the image, epsilon, cosine schedule, Adam."""
    from diffusers import DDPMScheduler

    ours = initial(recipe)
    unet, embedding = their_unet(recipe, None, layout), nn.Embedding(11, 4)
    unet.load_state_dict(ours.unet.state_dict())
    embedding.load_state_dict(ours.conditioners["class_map"].embedding.state_dict())
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    adam = torch.optim.Adam([*unet.parameters(), *embedding.parameters()], lr=1e-3)
    losses = []
    for x, labels, noise, u, _ in Draws(recipe):
        t = (u * 1000).long()
        planes = embedding(labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
        noisy = scheduler.add_noise(x, noise, t)
        loss = (unet(torch.cat([noisy, planes], 1), t).sample - noise).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


def zenchiyu_losses(recipe: Recipe, layout: torch.memory_format = torch.contiguous_format) -> list[float]:
    """EDM's loss on F, labels replaced by the null class with p_uncond, Adam at a constant rate; Karras et al. 2022, table 1."""
    ours = initial(recipe)
    unet = their_unet(recipe, 11, layout)
    weights = ours.unet.state_dict() | {"class_embedding.weight": ours.conditioners["label"].embedding.weight.detach()}
    unet.load_state_dict(weights)
    adam = torch.optim.Adam(unet.parameters(), lr=1e-4)
    sd, losses = recipe.objective.sigma_data, []
    for x, labels, noise, u, dropped in Draws(recipe):
        sigma = (-1.2 + 1.2 * torch.special.ndtri(u)).exp().clamp(0.002, 80).float()
        labels = labels.masked_fill(dropped < 0.2, 10)
        s = sigma[:, None, None, None]
        c_skip, c_out, c_in = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt(), 1 / (s**2 + sd**2).sqrt()
        noisy = x + s * noise
        target = (x - c_skip * noisy) / c_out
        loss = (unet(c_in * noisy, sigma.log() / 4, class_labels=labels).sample - target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    return losses


PAIRS = {"mnist_concat": notebook_losses, "fashion_mnist_edm": zenchiyu_losses}
BOUNDS = {"mnist_concat": 1e-4, "fashion_mnist_edm": 1e-5}


def compare(name: str, clothes: Path, out: Path, steps: int, batch: int) -> None:
    recipe = recipe_of(name, clothes, out, steps, batch)
    theirs, ours = np.array(PAIRS[name](recipe)), np.array(our_losses(recipe))
    assert len(ours) == steps
    apart = np.abs(ours / theirs - 1)
    print(f"{name}: {steps} losses, {theirs[0]:.4f} to {theirs[-1]:.4f}, largest relative difference {apart.max():.1e}")
    # Two fp32 programs drift apart under Adam, fastest where a gradient is zero but for rounding; a fault shows at once.
    assert apart[0] <= 1e-6
    assert apart.max() <= BOUNDS[name]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_are_those_of_the_published_loop(name, clothes, tmp_path):
    compare(name, clothes, tmp_path / "run", steps=10, batch=4)


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_two_hundred_losses_are_those_of_the_published_loop(name, clothes, tmp_path):
    """Two fp32 programs drift apart: ours from theirs no further than theirs from itself in another memory layout."""
    recipe = recipe_of(name, clothes, tmp_path / "run", steps=200, batch=4)
    theirs, again = (np.array(PAIRS[name](recipe, f)) for f in (torch.contiguous_format, torch.channels_last))
    ours = np.array(our_losses(recipe))
    apart, control = np.abs(ours / theirs - 1).max(), np.abs(again / theirs - 1).max()
    means = abs(ours.mean() / theirs.mean() - 1)
    print(
        f"{name}: largest relative difference {apart:.1e}, theirs from itself {control:.1e}, of the means {means:.1e}"
    )
    assert apart <= max(1e-5, 2 * control) and means <= 1e-4


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_ten_short_epochs_have_the_published_loops_means(name, clothes, tmp_path):
    """Ten epochs of 40 steps: each mean within half a percent."""
    recipe = recipe_of(name, clothes, tmp_path / "run", steps=400, batch=4)
    theirs, ours = (np.array(losses).reshape(10, 40).mean(1) for losses in (PAIRS[name](recipe), our_losses(recipe)))
    print(f"{name}: epochs' means {np.round(ours, 4)}, apart {np.abs(ours / theirs - 1).max():.1e}")
    assert np.abs(ours / theirs - 1).max() <= 0.005


def test_the_data_is_read_as_torchvision_would(clothes):
    """Rows of pixels in [0, 255], label beside them, one channel."""
    data = Shards(shards=clothes, size=28, channels=1, resize="none").open(torch.device("cpu"))
    batch = data.read(draws.plan(0, np.arange(8), data.count))
    assert batch.images_NHWC.shape == (8, 28, 28, 1) and batch.images_NHWC.dtype == torch.uint8
    assert [data.classes[i] in batch.captions[k] for k, i in enumerate(batch.labels_N.tolist())] == [True] * 8
