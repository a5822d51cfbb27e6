"""Faults that a GPU would show first: no CPU tensor is mixed with one of the device, and nothing waits for the device.

PyTorch's meta device stands in for the GPU: it raises on operations across devices and on reading a tensor's value.
"""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from duotone.data.batch import Batch
from duotone.data.shards import Shards
from duotone.engine import artifact
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.temperature import Temperature
from duotone.engine.conditioning.text import ByteText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus
from duotone.engine.sampling.samplers.named import SAMPLERS
from duotone.engine.sampling.steering import Steering, composed_denoiser, guided_denoiser
from duotone.engine.speed import Choice
from duotone.engine.train import micro_step

META = torch.device("meta")
FACTS = Facts(classes=("cat", "dog"), attributes=("Bald", "Male"))
IMAGE, MASK = np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), bool)
KINDS = {
    "text": (ByteText(width=16, layers=1, heads=2, length=24), ["a cat", "a dog"]),
    "label": (Label(), ["dog", "cat"]),
    "label as a token": (Label(port="tokens", encoding="one_hot"), ["dog", "cat"]),
    "attributes": (Attributes(), [{"Bald": 1, "Male": 1}, {"Bald": 0, "Male": 0}]),
    "attributes as a vector": (Attributes(port="vector"), [{"Bald": 1}, {"Male": 0}]),
    "class map": (ClassMap(), [0, 1]),
    "class map, one-hot": (ClassMap(encoding="one_hot"), [0, 1]),
    "low resolution": (LowResolution(), [IMAGE[:2, :2], IMAGE]),
    "hole": (Hole(), [(IMAGE, MASK)] * 2),
}
OBJECTIVES = {
    "edm": EDM(),
    "edm, learned uncertainty": EDM(uncertainty=True),
    "ddpm": DDPM(),
    "ddpm, cosine, v, min-SNR": DDPM(schedule="cosine", prediction="v", weighting="min_snr"),
    "ddpm, x0, SNR": DDPM(prediction="x0", weighting="snr"),
    "ddpm, zero terminal SNR": DDPM(prediction="v", rescale_zero_snr=True),
    "flow": Flow(),
}


PAIRS = [(kind, "edm") for kind in KINDS] + [("label", name) for name in OBJECTIVES if name != "edm"]


def model_of(config, objective, **settings) -> artifact.Model:
    reads = "cross" if config.port == "tokens" else "self"
    extra = {"class_map": 4, "low_resolution": 3, "hole": 4}.get(config.kind, 0)
    if getattr(config, "encoding", "") == "one_hot" and extra:
        extra = len(FACTS.classes)
    shape = UNetConfig(
        channels=(16, 16),
        attention=("none", reads),
        middle=reads,
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=16,
        extra_channels=extra,
        groups=8,
    )
    conditioning = (config, *settings.pop("more", ()))
    recipe = Recipe(
        name="t", data=Shards(size=8), conditioning=conditioning, model=shape, objective=objective, **settings
    )
    return artifact.Model(artifact.build(recipe, FACTS).to(META), objective, FACTS, recipe)


def empty(*_: object) -> torch.Tensor:
    return torch.empty(2, 3, 8, 8, device=META)


def sampled(denoise, solver, sigmas: torch.Tensor) -> None:
    with torch.inference_mode():
        x_NCHW = solver(denoise, empty(), sigmas, noise=empty, on_step=None)
    assert x_NCHW.device == META and x_NCHW.shape == (2, 3, 8, 8)


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("kind,objective", PAIRS)
def test_guided_sampling_stays_on_its_device(kind, objective):
    config, values = KINDS[kind]
    model = model_of(config, OBJECTIVES[objective])
    solver, sigmas = SAMPLERS["stochastic_heun"], model.objective.falling_sigmas(2)
    steering = Steering(interval=(0.1, 100.0), rescale=0.0, rule=None, guide=None)
    guidance = steering.guidance([2.0, 3.0], sigmas, solver)
    sampled(guided_denoiser(model, ({config.kind: values}, {}), steering, guidance, 2, (8, 8)), solver, sigmas)


@pytest.mark.parametrize("solver", SAMPLERS)
def test_every_sampler_stays_on_its_device(solver):
    model = model_of(Label(), EDM())
    plain = Steering(interval=(0.0, 100.0), rescale=0.0, rule=None, guide=None)
    denoise = guided_denoiser(model, ({"label": ["dog", "cat"]}, {}), plain, None, 2, (8, 8))
    sampled(denoise, SAMPLERS[solver], model.objective.falling_sigmas(3))


@pytest.mark.parametrize(
    "settings",
    [{"rescale": 0.7}, {"rule": Apg(radius=2.0)}, {"rule": CfgPlusPlus()}, {"guide": "another model"}],
    ids=["rescale", "apg", "cfg++", "guide"],
)
def test_every_way_to_guide_stays_on_its_device(settings):
    config, values = KINDS["text"]
    model = model_of(config, EDM())
    sigmas, solver = model.objective.falling_sigmas(3), SAMPLERS["euler"]
    plain = {"interval": (0.0, 100.0), "rescale": 0.0, "rule": None, "guide": None}
    steering = Steering(**plain | settings | ({"guide": model_of(config, EDM())} if "guide" in settings else {}))
    guidance = steering.guidance([0.5, 0.6], sigmas, solver)
    sampled(guided_denoiser(model, ({config.kind: values}, {}), steering, guidance, 2, (8, 8)), solver, sigmas)


def test_scales_by_attribute_stay_on_their_device():
    config, values = KINDS["attributes"]
    model = model_of(config, DDPM())
    denoise = composed_denoiser(model, {"attributes": values}, {"Bald": 2.0, "Male": 3.0}, (8, 8))
    sampled(denoise, SAMPLERS["heun"], model.objective.falling_sigmas(3))


# ------------------------------------------------------------------------------------------------------- training


class OnTheDevice:
    """Replaces DeepSpeed's engine in a run: calls the network and takes the loss."""

    device = META

    def __init__(self, network):
        self.network = network

    def __call__(self, *inputs):
        return self.network(*inputs)

    def backward(self, loss: torch.Tensor) -> None:
        assert loss.device == META and loss.shape == ()
        loss.backward()


def batch() -> Batch:
    """A batch as the loader hands it over: images on the device, names on the CPU."""
    return Batch(
        positions_N=np.arange(2),
        keys=["a", "b"],
        images_NHWC=torch.empty(2, 8, 8, 3, dtype=torch.uint8, device=META),
        captions=["a cat", "a dog"],
        labels_N=torch.tensor([0, 1]),
        attributes_NK=torch.tensor([[1, 0], [0, -1]]),
    )


def trained(model: artifact.Model) -> None:
    choice = Choice("cuda", "fp32", False)
    run = SimpleNamespace(recipe=model.recipe, network=model.network, choice=choice, sharded=OnTheDevice(model.network))
    loss, input_NCHW = micro_step(run, batch())
    assert input_NCHW.device == META and input_NCHW.shape == (2, 3, 8, 8)


@pytest.mark.parametrize("kind,objective", PAIRS)
def test_a_training_step_stays_on_its_device(kind, objective):
    trained(model_of(KINDS[kind][0], replace(OBJECTIVES[objective], loss="huber"), flip=True, drop_together=0.1))


@pytest.mark.parametrize("stratified", [False, True])
def test_training_without_guidance_stays_on_its_device(stratified):
    trained(model_of(Label(), EDM(stratified=stratified), more=(Temperature(),)))
