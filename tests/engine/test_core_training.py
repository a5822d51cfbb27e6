"""One overfit per objective, and every two conditionings together: real draws, loss and sampling in a plain loop."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duotone.data.batch import Batch
from duotone.data.shards import Shards
from duotone.engine.artifact import Model, build
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample
from duotone.engine.train import Run, micro_step

FACTS = Facts(classes=("cat", "dog", "bird"), attributes=("round", "red"))
PICTURE = np.full((8, 8, 3), (220, 90, 30), dtype=np.uint8)
PICTURE[:, 4:] = (20, 60, 200)
PICTURE[5:, :] = 240


class InProcess:
    """The network as zero.Sharded presents it, without DeepSpeed."""

    device = torch.device("cpu")

    def __init__(self, network):
        self.network = network

    def __call__(self, *inputs):
        return self.network(*inputs)

    def backward(self, loss):
        loss.backward()


def network_of(conditions=()) -> UNetConfig:
    """A UNet that fits the ports."""
    ports = [c.port for c in conditions]
    extra = sum({"class_map": 4, "low_resolution": 3, "hole": 4}.get(c.kind, 0) for c in conditions)
    kind = "cross" if "tokens" in ports else "none"
    return UNetConfig(
        channels=(24,),
        attention=(kind,),
        middle="single",
        heads=(2,),
        blocks=(1,),
        depth=(1,),
        context_width=16,
        groups=8,
        extra_channels=extra,
    )


def batch_of(step: int, size: int) -> Batch:
    """`size` copies of the picture, with labels, attributes and captions that differ."""
    positions_N = np.arange(step * size, (step + 1) * size)
    return Batch(
        positions_N=positions_N,
        keys=["k"] * size,
        images_NHWC=torch.from_numpy(PICTURE).repeat(size, 1, 1, 1),
        captions=["a cat"] * size,
        labels_N=torch.from_numpy(positions_N % 3),
        attributes_NK=torch.from_numpy(np.stack([positions_N % 3 - 1, positions_N % 2], 1)).to(torch.int8),
    )


def trained(recipe: Recipe, steps: int, lr: float = 1e-2) -> tuple[Model, list[float]]:
    torch.manual_seed(0)
    network = build(recipe, FACTS)
    choice = SimpleNamespace(dtype=torch.float32)
    run = Run(recipe, choice, None, None, FACTS, network, InProcess(network))
    optimizer = torch.optim.Adam(network.parameters(), lr=lr, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses = []
    for step in range(steps):
        loss, _ = micro_step(run, batch_of(step, recipe.batch_size))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(loss.item())
    model = Model(network.eval().requires_grad_(False), recipe.objective, FACTS, recipe)
    return model, losses


OBJECTIVES = {
    "epsilon": (DDPM(), "ancestral"),
    "x0": (DDPM(schedule="cosine", prediction="x0", weighting="min_snr", loss="huber"), "ancestral"),
    "v_zero_snr": (DDPM(prediction="v", rescale_zero_snr=True), "ancestral"),
    "edm": (EDM(sigma_data=0.6), "heun"),
    "flow": (Flow(), "euler"),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_network_driven_to_one_image_samples_it_back(name):
    """A wrong sign, scaling or c_noise anywhere between loss and sampler cannot pass: such a picture is off by 60 or more."""
    objective, sampler = OBJECTIVES[name]
    recipe = Recipe(name="t", data=Shards(size=8), model=network_of(), objective=objective, batch_size=16)
    model, losses = trained(recipe, 240)
    images = sample(model, count=4, steps=30, sampler=sampler, seed=1)
    assert np.abs(images.astype(float) - PICTURE).mean() < 12, (losses[0], losses[-1])


CONDITIONS = {
    "text": (ByteText(width=16, layers=1, heads=2, length=16), {"prompts": ["a cat"]}),
    "label": (Label(), {"labels": ["dog"]}),
    "attributes": (Attributes(), {"attributes": [["red"]]}),
    "attribute_vector": (Attributes(port="vector"), {"attributes": [[1, None]]}),
    "class_map": (ClassMap(), {"labels": ["dog"]}),
    "low_resolution": (LowResolution(), {"images": [PICTURE[::4, ::4]]}),
    "hole": (Hole(), {"holes": [(PICTURE, PICTURE[..., 0] > 100)]}),
}
PAIRS = [p for p in itertools.combinations(CONDITIONS, 2) if p != ("attributes", "attribute_vector")]


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_every_two_conditionings_train_and_sample_together(pair):
    conditions = tuple(CONDITIONS[kind][0] for kind in pair)
    asked = {name: rows for kind in pair for name, rows in CONDITIONS[kind][1].items()}
    recipe = Recipe(
        name="t",
        data=Shards(size=8),
        conditioning=conditions,
        model=network_of(conditions),
        drop_together=0.1,
        flip=True,
        batch_size=4,
    )
    recipe.check_conditioning()
    model, losses = trained(recipe, 3)
    assert np.isfinite(losses).all()
    images = sample(model, **asked, steps=2, guidance=2.0, sampler="euler")
    assert images.shape == (1, 8, 8, 3)
