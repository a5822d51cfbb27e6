"""One overfit per objective, and every pair of conditionings: real draws, loss and sampling in a plain loop."""

import importlib
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from duotone.data import captioned_shapes
from duotone.data.batch import Batch, to_device
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.write_shards import Sample, write_shards
from duotone.engine import draws
from duotone.engine.artifact import Model, build
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Conditioning, Facts
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.conditioning.image import ClassMap, Hole, LowResolution
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.temperature import Temperature
from duotone.engine.conditioning.text import ByteText
from duotone.engine.log import Log
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.objectives.sigma_data import measured_sigma_data
from duotone.engine.optimizers.adamw import AdamW
from duotone.engine.preview import Previews
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample
from duotone.engine.sampling.guidance import GuidedDenoiser
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.speed import Speed
from duotone.engine.train import Run, inputs_of, micro_step, noise_levels, train
from duotone.kernels.philox import uniform_reference

FACTS = Facts(classes=("cat", "dog", "bird"), attributes=("round", "red"))
PICTURE = np.full((8, 8, 3), (220, 90, 30), dtype=np.uint8)
PICTURE[:, 4:] = (20, 60, 200)
PICTURE[5:, :] = 240


class InProcess:
    """The network as Sharded presents it, without DeepSpeed."""

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
    """`size` copies of the picture, with different labels, attributes and captions."""
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
    "flow": (Flow(stratified=True), "euler"),
    "edm_uncertainty": (EDM(sigma_data=0.6, uncertainty=True, stratified=True), "heun"),
}


SEVERAL = ("x0", "edm_uncertainty")  # other tests compare their parts with their definitions
ONE_IMAGE = [pytest.param(name, marks=pytest.mark.long) if name in SEVERAL else name for name in OBJECTIVES]


@pytest.mark.parametrize("name", ONE_IMAGE)
def test_a_network_driven_to_one_image_samples_it_back(name):
    """A wrong sign between loss and sampler cannot pass: its picture is off by 130 or more, a random one by about 75.

    A wrong c_noise can pass, since such a small network reads the noise level off its input: the next test checks it.
    """
    objective, sampler = OBJECTIVES[name]
    recipe = Recipe(name="t", data=Shards(size=8), model=network_of(), objective=objective, batch_size=16)
    model, losses = trained(recipe, 240)
    images = sample(model, count=4, steps=30, sampler=sampler, seed=1)
    assert np.abs(images.astype(float) - PICTURE).mean() < 25, (losses[0], losses[-1])


C_NOISE = {
    "epsilon": lambda sigma: (DDPM().sigmas - sigma).abs().argmin().item(),
    "x0": lambda sigma: (DDPM(schedule="cosine").sigmas - sigma).abs().argmin().item(),
    "v_zero_snr": lambda sigma: (DDPM(prediction="v", rescale_zero_snr=True).sigmas - sigma).abs().argmin().item(),
    "edm": lambda sigma: math.log(sigma) / 4,
    "flow": lambda sigma: 1000 * sigma / (1 + sigma),
}


@pytest.mark.parametrize("name", C_NOISE)
def test_the_sampler_shows_the_network_what_training_showed_it(name):
    """At each training row's sigma and noise: the same input, the paper's c_noise, and F* denoises to the picture."""
    objective = OBJECTIVES[name][0]
    recipe = Recipe(name="t", data=Shards(size=8), model=network_of(), objective=objective, batch_size=8)
    torch.manual_seed(0)
    network = build(recipe, FACTS)
    seen = []
    network.unet.register_forward_pre_hook(lambda m, a: seen.append(a[:2]))
    run = Run(recipe, SimpleNamespace(dtype=torch.float32), None, None, FACTS, network, InProcess(network))
    batch = batch_of(3, 8)
    micro_step(run, batch)
    ((inputs, times),) = seen
    x0 = torch.from_numpy(PICTURE).permute(2, 0, 1).float() / 127.5 - 1
    noise = draws.normal(0, batch.positions_N, draws.Purpose.NOISE, 192).view(8, 8, 8, 3).permute(0, 3, 1, 2)
    sigma_N = noise_levels(recipe, batch.positions_N)
    denoise = GuidedDenoiser(network.eval(), objective, Conditioning(), None)
    for i, sigma in enumerate(sigma_N.tolist()):
        target = objective.coefficients(sigma_N)[i, 2:].float()
        network.unet.forward = lambda *a, f=target[0] * x0 + target[1] * noise[i], **k: f[None]
        x = x0 + sigma * noise[i]
        denoised = denoise(x[None], sigma)
        torch.testing.assert_close(seen[-1][0], inputs[i : i + 1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen[-1][1], times[i : i + 1])
        assert times[i].item() == pytest.approx(C_NOISE[name](sigma), rel=1e-5, abs=1e-3)
        torch.testing.assert_close(denoised[0], x0, rtol=1e-3, atol=1e-5 * max(1, sigma))


def test_the_learned_uncertainty_is_the_log_of_the_loss():
    """Karras et al. 2024, equation 15: loss / exp(u) + u is least where exp(u) is the expected loss, known here."""
    objective = EDM(uncertainty=True)
    recipe = Recipe(name="t", data=Shards(size=8), model=network_of(), objective=objective, batch_size=256)
    torch.manual_seed(0)
    part = build(recipe, FACTS).uncertainty
    optimizer = torch.optim.Adam(part.parameters(), lr=3e-2)
    g = torch.Generator().manual_seed(0)
    expected = lambda sigma: 0.3 * (1 + sigma) / (0.1 + sigma)  # noqa: E731 - any positive function
    for _ in range(300):
        sigma_N = objective.draw_sigma(torch.rand(256, generator=g, dtype=torch.float64))
        time_N = objective.scalings(sigma_N).noise_N.float()
        error_N = (expected(sigma_N) / objective.loss_weight(sigma_N)).sqrt().float()
        zero = torch.zeros(256, 3, 2, 2)
        objective(zero + error_N[:, None, None, None], zero, sigma_N, part(time_N)).backward()
        optimizer.step()
        optimizer.zero_grad()
    sigma_N = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)
    got = part(objective.scalings(sigma_N).noise_N.float()).exp()
    torch.testing.assert_close(got, expected(sigma_N).float(), rtol=0.1, atol=0.0)


def test_guidance_free_loss_is_its_papers_and_stops_the_gradient():
    """Chen et al. 2025, algorithm 1: |beta F(c, beta) + (1 - beta) sg F(null, 1) - target|^2, beta 1 where c is dropped."""
    conditions = (Label(dropout=0.5), Temperature())
    recipe = Recipe(name="t", data=Shards(size=8), conditioning=conditions, model=network_of(conditions), batch_size=8)
    torch.manual_seed(0)
    network = build(recipe, FACTS)
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.1)
    tensors, keep = conditioned(network.conditioners, batch_of(0, 8), 0, torch.zeros(8, dtype=torch.bool), 0.0)
    assert 0 < keep["label"].sum() < 8
    x, t = torch.randn(8, 3, 8, 8), torch.rand(8)
    mixed, _ = network(x, t, tensors, keep)
    mixed.square().mean().backward()
    got = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    network.zero_grad()
    beta = torch.where(keep["label"], tensors["temperature"]["beta_N"], torch.ones(8))
    label, time = network.conditioners["label"], network.conditioners["temperature"]
    every = torch.ones(8, dtype=torch.bool)
    vector = lambda kept, b: label(tensors["label"], kept).vector_NE + time({"beta_N": b}, every).vector_NE  # noqa: E731
    guided = network.unet(x, t, vector(keep["label"], beta))
    null = network.unet(x, t, vector(~every, torch.ones(8))).detach()
    wide = beta[:, None, None, None]
    expected = wide * guided + (1 - wide) * null
    torch.testing.assert_close(mixed, expected)
    expected.square().mean().backward()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, dict(network.named_parameters())[name].grad, rtol=1e-4, atol=1e-7)


def test_guidance_free_network_is_guided_in_one_forward():
    """Trained on one image with labels, it samples the image back at any guidance scale, at the cost of one branch."""
    conditions = (Label(dropout=0.2), Temperature(low=0.2))
    recipe = Recipe(
        name="t",
        data=Shards(size=8),
        conditioning=conditions,
        model=network_of(conditions),
        objective=EDM(sigma_data=0.6),
        batch_size=16,
    )
    model, _ = trained(recipe, 240)
    images = sample(model, labels=[0, 1], steps=20, guidance=[1.0, 4.0], seed=1)
    assert np.abs(images.astype(float) - PICTURE).mean() < 25
    assert model.forwards == 39, "20 Heun steps: one forward a call"
    with pytest.raises(Refused, match="guidance-free and takes 1 or more"):
        sample(model, labels=[0], guidance=0.5, steps=1)
    with pytest.raises(Refused, match="guidance needs a condition"):
        sample(model, count=1, guidance=2.0, steps=1)
    with pytest.raises(Refused, match="guidance = 6.0: this model was trained guidance-free up to 5"):
        sample(model, labels=[0], guidance=6.0, steps=1)
    for steering in ({"rescale": 0.5}, {"interval": (0.1, 1.0)}, {"rule": Apg()}, {"negative": {"labels": [1]}}):
        with pytest.raises(Refused, match="trained guidance-free: it takes guidance as one number"):
            sample(model, labels=[0], guidance=2.0, steps=1, **steering)


@pytest.mark.parametrize("first", [0, draws.BLOCK - 3, 2**32 - 2, 2**33 + 5])
def test_numbers_are_functions_of_their_position_however_many_are_made_at_once(first):
    """Positions within one block, across its end, out of order and far apart."""
    for positions_N in (
        first + np.arange(7),
        first + np.arange(4),
        first + np.array([6, 0, 3]),
        np.array([first + 5, 2**40, 1]),
        np.array([], int),
    ):
        expected = uniform_reference(3, torch.as_tensor(positions_N), int(draws.Purpose.CROP), 2)
        found = draws.uniform(3, positions_N, draws.Purpose.CROP, 2)
        assert torch.equal(found, expected)
        found += 1  # the result belongs to the caller
        assert torch.equal(draws.uniform(3, positions_N, draws.Purpose.CROP, 2), expected)


def test_stratified_levels_fall_one_to_a_stratum_in_every_batch():
    for batch in (1, 2, 16, 96, 100):
        positions_N = np.arange(3 * batch, 4 * batch)
        u_N = draws.uniform(0, positions_N, draws.Purpose.SIGMA)[:, 0]
        spread_N = draws.stratified(u_N, positions_N, batch)
        assert sorted((spread_N * batch).long().tolist()) == list(range(batch))
        half = draws.stratified(u_N[batch // 2 :], positions_N[batch // 2 :], batch)
        assert torch.equal(half, spread_N[batch // 2 :]), "a function of the position"
    quarter = draws.stratified(u_N, positions_N, 100)[:25]
    assert abs(quarter.mean().item() - 0.5) < 0.05, "a micro-batch sees all levels"


def test_sigma_data_is_measured_from_the_data(tmp_path):
    captioned_shapes.write(tmp_path / "shapes", count=48, size=16, seed=0)
    data = Shards(shards=tmp_path / "shapes", size=16).open(torch.device("cpu"))
    every = data.read(draws.plan(7, np.arange(48), 48)).images_NHWC.double() / 127.5 - 1
    assert measured_sigma_data(data, at_once=20) == pytest.approx(every.std(correction=0).item(), rel=1e-9)
    fitted = EDM(sigma_data=None).fitted(data)
    assert fitted.sigma_data == pytest.approx(every.std().item(), rel=1e-4)
    assert EDM(sigma_data=0.5).fitted(data).sigma_data == 0.5
    data.close()


def test_data_of_one_grey_is_refused(tmp_path):
    grey = [Sample(image=np.full((16, 16, 3), 37, np.uint8)) for _ in range(4)]
    write_shards(grey, tmp_path / "grey", image_format="npy")
    data = Shards(shards=tmp_path / "grey", size=16).open(torch.device("cpu"))
    with pytest.raises(Refused, match="every pixel of the data is the same"):
        measured_sigma_data(data)
    data.close()


def test_a_run_with_dropout_inside_the_network_goes_on_bit_for_bit(tmp_path):
    """One run is interrupted and draws pictures on the way, which use the same generator."""
    captioned_shapes.write(tmp_path / "shapes", count=48, size=16, seed=0)
    recipe = Recipe(
        name="dropout",
        data=Shards(shards=tmp_path / "shapes", size=16, decoder="pillow", threads=1),
        model=replace(network_of(), dropout=0.3),
        optimizer=AdamW(warmup=0, schedule="constant"),
        batch_size=8,
        accumulation=2,
        images=64,
        log=Log(every=1),
        preview=Previews(every=0, rows=1, columns=1, steps=1, sampler="euler", strips=False),
        speed=Speed(threads=1),
        out=tmp_path / "whole",
    )
    train(recipe)
    cut = replace(recipe, out=tmp_path / "cut", preview=replace(recipe.preview, every=8))
    train(replace(cut, images=24))
    train(cut)
    whole, resumed = (losses_in(run.out) for run in (recipe, cut))
    assert len(whole) == 8 and resumed == whole
    still = replace(recipe, out=tmp_path / "still", model=network_of())
    assert losses_in(train(still)) != whole, "it drops something"


def losses_in(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


CONDITIONS = {
    "text": (ByteText(width=16, layers=1, heads=2, length=16), {"prompts": ["a cat"]}),
    "label": (Label(), {"labels": ["dog"]}),
    "attributes": (Attributes(), {"attributes": [["red"]]}),
    "attribute_vector": (Attributes(port="vector"), {"attributes": [[1, None]]}),
    "class_map": (ClassMap(), {"labels": ["dog"]}),
    "low_resolution": (LowResolution(), {"images": [PICTURE[::4, ::4]]}),
    "hole": (Hole(), {"holes": [(PICTURE, PICTURE[..., 0] > 100)]}),
    "temperature": (Temperature(), {}),
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


class CopiesBetweenDevices(TorchDispatchMode):
    """Notes for every copy from one device to another whether it lets the CPU continue."""

    def __init__(self):
        super().__init__()
        self.go_on = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        target = options.get("device")
        if "_to_copy" in str(function) and target is not None and torch.device(target).type != arguments[0].device.type:
            self.go_on.append(bool(options.get("non_blocking")))
        return function(*arguments, **options)


@pytest.mark.parametrize("kind", ["attributes", "class_map", "low_resolution", "hole", "text"])
def test_nothing_that_a_step_sends_to_the_device_waits_for_it(kind, monkeypatch):
    """A device without memory stands in for the GPU; images are there already, where the reader puts them."""
    conditions = (CONDITIONS[kind][0], Label())
    recipe = Recipe(
        name="t", data=Shards(size=8), conditioning=conditions, model=network_of(conditions), flip=True, batch_size=4
    )
    recipe.check_conditioning()
    network = build(recipe, FACTS)
    device = SimpleNamespace(device=torch.device("meta"))
    run = Run(recipe, SimpleNamespace(dtype=torch.float32), None, None, FACTS, network, device)
    module = importlib.import_module("duotone.engine.train")  # the package's `train` is the function
    monkeypatch.setattr(module, "diffuse", lambda images_NHWC, *rest, dtype: (images_NHWC, images_NHWC))
    batch = batch_of(1, 4)
    with CopiesBetweenDevices() as copies:
        inputs = inputs_of(run, replace(batch, images_NHWC=to_device(batch.images_NHWC, device.device)))
    assert {tensor.device.type for tensor in tree_leaves(inputs)} == {"meta"}
    assert len(copies.go_on) >= 8 and all(copies.go_on)
