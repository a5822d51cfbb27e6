"""Paired replication: a published loop in diffusers and torch beside our recipe, on the same draws, loss against loss.

The published side is written here from the papers and notebooks: diffusers' UNet2DModel, their scheduler or the EDM
equations, torch's Adam, plain PyTorch. It is fed our sample order, noise, noise levels and drops, and our initial weights.

Left alone, two fp32 programs drift apart, because Adam moves a weight whose gradient is only rounding error as far as
any other; even diffusers' loop drifts from itself in another memory layout. So they are also compared step by step:
each of our steps begins from the published loop's weights and moments, and must give its loss, its next moments and its
next weights.
"""

import json
import runpy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from duotone.data.shards import Shards
from duotone.engine import artifact, draws
from duotone.engine.conditioning.base import Facts
from duotone.engine.distributed import zero
from duotone.engine.exchange import diffusers_unet
from duotone.engine.log import Log
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.run import Run, plans
from duotone.engine.set_up import set_up
from duotone.engine.train import train, train_step

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
    """The recipe, changed only to fewer images and a smaller batch."""
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
    return logged(recipe)


def logged(recipe: Recipe) -> list[float]:
    return [json.loads(line)["loss"] for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]


class Draws:
    """What our run draws, position by position, as plain tensors."""

    def __init__(self, recipe: Recipe):
        self.recipe, self.data = recipe, recipe.data.open(torch.device("cpu"))

    def all_pixels(self) -> torch.Tensor:
        everything = draws.plan(0, np.arange(self.data.count), self.data.count)
        return self.data.read(everything).images_NHWC.double() / 255 * 2 - 1

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

    theirs = diffusers_unet.to_config(recipe.model, recipe.data.size, classes)
    assert theirs.pop("_class_name") == "UNet2DModel"
    return UNet2DModel(**theirs).to(memory_format=layout)


@dataclass
class Published:
    """A published loop at its start: its parameters by our names, its Adam, and its losses, each of which takes a step."""

    named: dict[str, nn.Parameter]
    adam: torch.optim.Adam
    losses: Iterator[float]

    def state(self, kind: str) -> dict[str, torch.Tensor]:
        """`weight`, `exp_avg` or `exp_avg_sq` by name, as they are now; moments begin at zero."""
        if kind == "weight":
            return {name: p.detach().clone().contiguous() for name, p in self.named.items()}
        moments = {name: self.adam.state[p].get(kind, torch.zeros_like(p)) for name, p in self.named.items()}
        return {name: value.clone().contiguous() for name, value in moments.items()}


def notebook(recipe: Recipe, layout: torch.memory_format = torch.contiguous_format) -> Published:
    """diffusion-models-class, unit 2: the class embedded in four channels beside the image, epsilon, cosine schedule, Adam."""
    from diffusers import DDPMScheduler

    ours = initial(recipe)
    unet, embedding = their_unet(recipe, None, layout), nn.Embedding(11, 4)
    unet.load_state_dict(ours.unet.state_dict())
    embedding.load_state_dict(ours.conditioners["class_map"].embedding.state_dict())
    scheduler = DDPMScheduler(1000, beta_schedule="squaredcos_cap_v2")
    # In fp32 their product is off by up to 3e-4 in sqrt(1 - alpha_bar), as 1 - 0.99996 loses digits: float64 here.
    scheduler.alphas_cumprod = (1 - scheduler.betas.double()).cumprod(0)
    adam = torch.optim.Adam([*unet.parameters(), *embedding.parameters()], lr=1e-3)

    def losses():
        for x, labels, noise, u, _ in Draws(recipe):
            t = (u * 1000).long()
            planes = embedding(labels)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            noisy = scheduler.add_noise(x.double(), noise.double(), t).float()
            loss = (unet(torch.cat([noisy, planes], 1), t).sample - noise).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            yield loss.item()

    named = {f"unet.{name}": p for name, p in unet.named_parameters()}
    return Published(named | {"conditioners.class_map.embedding.weight": embedding.weight}, adam, losses())


def zenchiyu(recipe: Recipe, layout: torch.memory_format = torch.contiguous_format) -> Published:
    """EDM's loss on F, labels replaced by the null class with p_uncond, Adam at a constant rate; Karras et al. 2022, table 1."""
    ours = initial(recipe)
    unet = their_unet(recipe, 11, layout)
    weights = ours.unet.state_dict() | {"class_embedding.weight": ours.conditioners["label"].embedding.weight.detach()}
    unet.load_state_dict(weights)
    adam = torch.optim.Adam(unet.parameters(), lr=1e-4)
    drawn = Draws(recipe)
    sd = drawn.all_pixels().std(correction=0).item()

    def losses():
        for x, labels, noise, u, dropped in drawn:
            # In float64: at low noise the target is a small difference of nearly equal images, imprecise in fp32.
            sigma = (-1.2 + 1.2 * torch.special.ndtri(u)).exp().clamp(0.002, 80)
            labels = labels.masked_fill(dropped < 0.2, 10)
            s = sigma[:, None, None, None]
            c_skip, c_out, c_in = sd**2 / (s**2 + sd**2), s * sd / (s**2 + sd**2).sqrt(), 1 / (s**2 + sd**2).sqrt()
            noisy = x.double() + s * noise.double()
            target = ((x.double() - c_skip * noisy) / c_out).float()
            output = unet((c_in * noisy).float(), (sigma.log() / 4).float(), class_labels=labels).sample
            loss = (output - target).square().mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            yield loss.item()

    named = {f"unet.{name}": p for name, p in unet.named_parameters()}
    named["conditioners.label.embedding.weight"] = named.pop("unet.class_embedding.weight")
    return Published(named, adam, losses())


PAIRS = {"mnist_concat": notebook, "fashion_mnist_edm": zenchiyu}
BOUNDS = {"mnist_concat": 1e-4, "fashion_mnist_edm": 1e-5}


def compare(name: str, clothes: Path, out: Path, steps: int, batch: int) -> None:
    recipe = recipe_of(name, clothes, out, steps, batch)
    theirs, ours = np.array(list(PAIRS[name](recipe).losses)), np.array(our_losses(recipe))
    assert len(ours) == steps
    apart = np.abs(ours / theirs - 1)
    print(f"{name}: {steps} losses, {theirs[0]:.4f} to {theirs[-1]:.4f}, largest relative difference {apart.max():.1e}")
    # Two fp32 programs drift apart under Adam, fastest where a gradient is only rounding; a fault shows at once.
    assert apart[0] <= 1e-6
    assert apart.max() <= BOUNDS[name]


def step_by_step(recipe: Recipe) -> dict[str, float]:
    """Takes our steps from the published loop's state; gives the largest differences of losses, moments and weights."""
    published = PAIRS[recipe.name](recipe, torch.channels_last)  # the layout of our activations
    with ExitStack() as held:
        held.push(zero.leave)  # as train() does: undoes what was set for a process without a launcher
        run = set_up(recipe, held)
        assert run.sharded.shapes() == {name: tuple(p.shape) for name, p in published.named.items()}
        batches, losses, states = run.data.batches(plans(run, run.images)), [], []
        while run.images < recipe.images:
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                run.sharded.scatter(kind, published.state(kind))
            train_step(run, batches)
            losses.append(next(published.losses))
            states.append(apart_after(run, published))
    apart = {kind: max(state[kind] for state in states) for kind in states[0]}
    return apart | {"loss": np.abs(np.array(logged(recipe)) / np.array(losses) - 1).max()}


def apart_after(run: Run, published: Published) -> dict[str, float]:
    """Relative differences of the moments, and of the weights that a gradient moves and not only its rounding."""
    kinds = ("weight", "exp_avg", "exp_avg_sq")
    ours, theirs = ({kind: flat(state(kind)) for kind in kinds} for state in (run.sharded.gather, published.state))
    moved = theirs["exp_avg_sq"] > 1e-6 * theirs["exp_avg_sq"].mean()  # gradients above 1e-3 of their root mean square
    moments = {kind: relative(ours[kind], theirs[kind]) for kind in ("exp_avg", "exp_avg_sq")}
    return moments | {"weight": relative(ours["weight"][moved], theirs["weight"][moved])}


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([named[name].flatten() for name in sorted(named)]).double()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def agree(apart: dict[str, float]) -> bool:
    """Losses agree within 1e-5, gradients within fp32's own uncertainty, about 2e-5 of float64's."""
    print(", ".join(f"{kind} {value:.1e}" for kind, value in apart.items()))
    return apart["loss"] <= 1e-5 and max(apart["exp_avg"], apart["exp_avg_sq"]) <= 1e-4 and apart["weight"] <= 1e-5


def one_step_late(objective: DDPM, u_N: torch.Tensor) -> torch.Tensor:
    """The cosine schedule off by one timestep."""
    return objective.sigmas[((u_N * objective.steps).long() + 1).clamp(max=objective.steps - 1)]


@pytest.mark.parametrize("name", PAIRS)
def test_losses_are_those_of_the_published_loop(name, clothes, tmp_path):
    compare(name, clothes, tmp_path / "run", steps=10, batch=4)


@pytest.mark.parametrize("name", PAIRS)
def test_each_step_is_the_published_loops(name, clothes, tmp_path):
    assert agree(step_by_step(recipe_of(name, clothes, tmp_path / "run", steps=3, batch=4)))


def test_a_step_that_is_not_the_published_loops_is_found(clothes, tmp_path, monkeypatch):
    """Planted faults: another beta2, then noise levels off by one timestep."""
    recipe = recipe_of("mnist_concat", clothes, tmp_path / "run", steps=2, batch=4)
    assert not agree(step_by_step(replace(recipe, optimizer=replace(recipe.optimizer, betas=(0.9, 0.998)))))
    monkeypatch.setattr(DDPM, "draw_sigma", one_step_late)
    assert not agree(step_by_step(replace(recipe, out=tmp_path / "late")))


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_each_of_two_hundred_steps_is_the_published_loops(name, clothes, tmp_path):
    """200 losses within 1e-5, each from the published loop's own weights and moments."""
    assert agree(step_by_step(recipe_of(name, clothes, tmp_path / "run", steps=200, batch=4)))


@pytest.mark.long
@pytest.mark.parametrize("name", PAIRS)
def test_two_hundred_losses_are_those_of_the_published_loop(name, clothes, tmp_path):
    """Two fp32 programs drift apart: ours from theirs no further than theirs from itself in another memory layout."""
    recipe = recipe_of(name, clothes, tmp_path / "run", steps=200, batch=4)
    theirs, again = (
        np.array(list(PAIRS[name](recipe, f).losses)) for f in (torch.contiguous_format, torch.channels_last)
    )
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
    """Ten epochs of 40 steps: each mean agrees within half a percent."""
    recipe = recipe_of(name, clothes, tmp_path / "run", steps=400, batch=4)
    theirs, ours = (
        np.array(losses).reshape(10, 40).mean(1) for losses in (list(PAIRS[name](recipe).losses), our_losses(recipe))
    )
    print(f"{name}: epochs' means {np.round(ours, 4)}, apart {np.abs(ours / theirs - 1).max():.1e}")
    assert np.abs(ours / theirs - 1).max() <= 0.005


def test_the_data_is_read_as_torchvision_would(clothes):
    """Rows of pixels in [0, 255] in one channel, with their label."""
    data = Shards(shards=clothes, size=28, channels=1, resize="none").open(torch.device("cpu"))
    batch = data.read(draws.plan(0, np.arange(8), data.count))
    assert batch.images_NHWC.shape == (8, 28, 28, 1) and batch.images_NHWC.dtype == torch.uint8
    assert [data.classes[i] in batch.captions[k] for k, i in enumerate(batch.labels_N.tolist())] == [True] * 8
