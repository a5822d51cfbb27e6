"""Rules of guidance against their papers in plain steps, a guide against two models, and what shared layers save."""

import math
import re
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine.artifact import Model, build
from duotone.engine.conditioning.attributes import Attributes
from duotone.engine.conditioning.base import Conditioning, Facts
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.recipe import Recipe
from duotone.engine.sample import sample, sweep
from duotone.engine.sampling.guidance import Guidance, GuidedDenoiser, cost_of_pair
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus
from duotone.engine.sampling.samplers.euler import euler
from duotone.engine.sampling.samplers.heun import heun

FACTS = Facts(classes=("cat", "dog", "bird"), attributes=("Bald", "Male"))
SIZES = dict(heads=(2, 2, 2), blocks=(1, 1, 1), depth=(1, 1, 1), context_width=16, groups=8, zero_init=False)
PLAIN = UNetConfig(channels=(16, 16, 16), attention=("none",) * 3, middle="self", **SIZES)
TEXT = UNetConfig(channels=(16, 16, 16), attention=("none", "cross", "cross"), **SIZES)
BOTTLENECK = UNetConfig(channels=(16, 16, 16), attention=("none",) * 3, middle="cross", **SIZES)
BYTES = ByteText(width=16, layers=1, heads=2, length=16, pooled=False)


def model_of(condition, network, objective=None, seed: int = 0) -> Model:
    torch.manual_seed(seed)
    recipe = Recipe(
        name="t", data=Shards(size=8), conditioning=(condition,), model=network, objective=objective or EDM()
    )
    return Model(build(recipe, FACTS).eval().requires_grad_(False), recipe.objective, FACTS, recipe)


def branches(model: Model, n: int = 2) -> Conditioning:
    """N conditional rows, then N null rows."""
    (conditioner,) = model.network.conditioners.values()
    values = {"labels": [0, 2], "prompts": ["a cat", "two dogs"]}[conditioner.keyword]
    with torch.inference_mode():
        return conditioner(conditioner.of_values(values * 2), torch.tensor([True] * n + [False] * n))


def plain_denoiser(model: Model, conditional: bool):
    """D of one branch, by a separate forward."""
    both = branches(model)
    rows = slice(0, 2) if conditional else slice(2, 4)
    one = Conditioning(**{k: None if v is None else v[rows] for k, v in vars(both).items()})
    return GuidedDenoiser(model.network, model.objective, one, None)


def start(sigma: float) -> torch.Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * sigma


@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_rescale_is_diffusers_on_the_networks_output(prediction):
    model = model_of(Label(), PLAIN, DDPM(prediction=prediction))
    x, sigma = start(3.0), 3.0
    scale_N = torch.tensor([5.0, 2.0])
    denoise = GuidedDenoiser(model.network, model.objective, branches(model), Guidance(scale_N=scale_N, rescale=0.7))
    c = model.objective.scalings(torch.full((2,), sigma, dtype=torch.float64))
    skip, out = (v.float()[:, None, None, None] for v in c[:2])
    f_cond, f_null = ((plain_denoiser(model, kind)(x, sigma) - skip * x) / out for kind in (True, False))
    mixed = f_null + scale_N[:, None, None, None] * (f_cond - f_null)
    expected = skip * x + out * rescale_noise_cfg(mixed, f_cond, guidance_rescale=0.7)
    torch.testing.assert_close(denoise(x, sigma), expected, rtol=2e-4, atol=2e-4)


def test_a_single_attribute_is_guided_by_a_negative_that_leaves_it_unknown():
    """D = D(all but one) + scale (D(all) - D(all but one)) in one Euler step, each D by a separate forward."""
    model = model_of(Attributes(port="vector"), PLAIN)
    conditioner = model.network.conditioners["attributes"]

    def plain(row, x, sigma):
        with torch.inference_mode():
            one = conditioner(conditioner.of_values([row]), torch.tensor([True]))
        return GuidedDenoiser(model.network, model.objective, one, None)(x, sigma)

    seen = []
    asked = dict(attributes=[[1, 0]], negative={"attributes": [[None, 0]]}, guidance=4.0, sampler="euler", steps=2)
    sample(model, **asked, on_step=lambda i, x, d: seen.append((x, d)))
    x, sigma = seen[0][0], model.objective.sampling_sigmas(2)[1].item()
    apart = plain([None, 0], x, sigma)
    expected = apart + 4 * (plain([1, 0], x, sigma) - apart)
    assert (seen[1][1] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


# ----------------------------------------------------------------------------------------------- shared layers


@pytest.mark.parametrize("network", [TEXT, BOTTLENECK], ids=["levels", "bottleneck"])
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_layers_before_the_condition_run_once_and_change_nothing(network, scale):
    model = model_of(BYTES, network)
    x = start(2.0)
    rows = []
    model.network.unet.conv_in.register_forward_hook(lambda m, a, out: rows.append(len(out)))
    denoise = GuidedDenoiser(
        model.network, model.objective, branches(model), Guidance(scale_N=torch.tensor([scale] * 2))
    )
    got = denoise(x, 2.0)
    assert rows == [2], "the first convolution sees each image once"
    cond, null = plain_denoiser(model, True)(x, 2.0), plain_denoiser(model, False)(x, 2.0)
    expected = null + scale * (cond - null)
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    pair = cost_of_pair(model.network.unet, (3, 8, 8), 16)
    assert denoise.forwards == pytest.approx(2 * pair)
    assert 1.0 < pair < 1.95


def test_where_the_time_embedding_carries_the_condition_nothing_is_shared():
    model = model_of(Label(), PLAIN)
    denoise = GuidedDenoiser(model.network, model.objective, branches(model), Guidance(scale_N=torch.tensor([3.0] * 2)))
    denoise(start(2.0), 2.0)
    assert denoise.forwards == 4


def test_cost_in_forwards_per_image():
    """Two forwards per guided call, one outside the interval; Heun's last step is a single call."""
    model = model_of(Label(), PLAIN)
    settings = dict(labels=[0, 1, 2], steps=4, chunk=2)
    sample(model, **settings)
    assert model.forwards == 7
    sample(model, **settings, guidance=2.0)
    assert model.forwards == 14
    sigmas = model.objective.sampling_sigmas(4)
    sample(model, **settings, guidance=2.0, sampler="euler", interval=(sigmas[2].item() * 0.9, sigmas[1].item() * 1.1))
    assert model.forwards == 6


@pytest.mark.parametrize("negative", [None, {"labels": [2, 2]}], ids=["null", "negative"])
def test_guidance_0_is_the_other_prediction_for_the_price_of_one(negative):
    """It equals what both branches give at a scale of almost 0; with one such image, both branches run again."""
    model = model_of(Label(), PLAIN)
    settings = dict(labels=[0, 1], negative=negative, steps=3, sampler="euler")
    alone = sample(model, **settings, guidance=0.0).astype(int)
    assert model.forwards == 3
    both = sample(model, **settings, guidance=[0.0, 1e-6]).astype(int)
    assert model.forwards == 6 and np.abs(alone - both).max() <= 1
    given = {"labels": [2, 2]} if negative else {"count": 2}
    np.testing.assert_array_equal(alone, sample(model, **given, steps=3, sampler="euler"))


# -------------------------------------------------------------------------------------------------------- rules


def test_cfg_plus_plus_is_its_papers_step():
    """Chung et al. 2024, algorithm 2, in variance-preserving terms: the noise added back is the unconditional one."""
    model = model_of(Label(), PLAIN, DDPM())
    sigmas, scale = model.objective.sampling_sigmas(6), 0.6
    cond, null = plain_denoiser(model, True), plain_denoiser(model, False)
    first = start(1.0)
    alpha = lambda s: 1 / math.sqrt(1 + s**2)  # noqa: E731
    z = first * sigmas[0].item() * alpha(sigmas[0].item())
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        x = z / alpha(sigma)
        d_null = null(x, sigma)
        guided = d_null + scale * (cond(x, sigma) - d_null)
        noise = (x - d_null) / sigma
        z = alpha(following) * guided + alpha(following) * following * noise
    rule = CfgPlusPlus().begin(sigmas, euler, [scale])
    guidance = Guidance(scale_N=torch.tensor([scale] * 2), rule=rule)
    denoise = GuidedDenoiser(model.network, model.objective, branches(model), guidance)
    got = euler(denoise, first * sigmas[0].item(), sigmas)
    torch.testing.assert_close(got, z, rtol=1e-3, atol=1e-3)


def test_cfg_plus_plus_from_infinite_noise():
    model = model_of(Label(), PLAIN, Flow())
    images = sample(model, labels=[0], steps=3, guidance=1.0, sampler="euler", rule=CfgPlusPlus())
    assert images.shape == (1, 8, 8, 3) and model.forwards == 6


def test_apg_is_its_papers_update():
    """Sadat et al. 2024, algorithm 1, written with plain vectors: momentum, bound, projection."""
    rule = Apg(parallel=0.3, radius=4.0, momentum=-0.5)
    run = rule.begin(torch.tensor([2.0, 1.0, 0.0]), heun, [0.6])
    g = torch.Generator().manual_seed(0)
    running = 0.0
    for _ in range(3):
        cond, null = (torch.randn(2, 3, 4, 4, generator=g, dtype=torch.float64) for _ in range(2))
        scale_N = torch.tensor([4.0, 7.0], dtype=torch.float64)
        got = run(cond, null, scale_N, 1.0)
        running = (cond - null).numpy() - 0.5 * running
        for i in range(2):
            c, d = cond[i].numpy().ravel(), running[i].ravel()
            d = d * min(1, 4.0 / np.linalg.norm(d))
            along = (d @ c) / (c @ c) * c
            expected = c + (scale_N[i].item() - 1) * (d - along + 0.3 * along)
            np.testing.assert_allclose(got[i].numpy().ravel(), expected, rtol=1e-9, atol=1e-12)


def test_apg_that_keeps_all_is_plain_guidance():
    model = model_of(Label(), PLAIN)
    settings = dict(labels=[0, 1], steps=3, guidance=[2.0, 5.0], sampler="euler")
    plain = sample(model, **settings)
    same = sample(model, **settings, rule=Apg(parallel=1.0, radius=0.0, momentum=0.0))
    assert np.abs(plain.astype(int) - same).max() <= 1
    assert not np.array_equal(plain, sample(model, **settings, rule=Apg()))


# ----------------------------------------------------------------------------------------------- a second model


def test_autoguidance_is_two_models_on_the_same_condition():
    model, weak = model_of(Label(), PLAIN), model_of(Label(dropout=0.0), PLAIN, seed=1)
    x, scale = start(2.0), 2.5
    (conditioner,) = model.network.conditioners.values()
    mine = plain_denoiser(model, True)
    other = plain_denoiser(weak, True)
    expected = other(x, 2.0) + scale * (mine(x, 2.0) - other(x, 2.0))
    guidance = Guidance(scale_N=torch.tensor([scale] * 2))
    denoise = GuidedDenoiser(model.network, model.objective, mine.both, guidance, (weak.network, other.both))
    assert (denoise(x, 2.0) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert denoise.forwards == 4
    # A model that guides itself changes nothing, and needs no null condition.
    settings = dict(labels=[0, 1], steps=3, sampler="euler")
    itself = sample(weak, **settings, guide=weak, guidance=3.0)
    assert np.abs(itself.astype(int) - sample(weak, **settings)).max() <= 1


def test_a_sweep_of_scales_is_one_row_each():
    model = model_of(Label(), PLAIN)
    settings = dict(labels=[0, 1], steps=2, sampler="euler", seed=3)
    rows = sweep(model, [1.0, 4.0], **settings)
    assert rows.shape == (2, 2, 8, 8, 3)
    assert np.array_equal(rows[1], sample(model, **settings, guidance=4.0))


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(rescale=1.5), "rescale = 1.5"),
        (dict(rescale=0.5, rule=Apg()), "leave it at 0 with Apg"),
        (dict(rule=CfgPlusPlus(), sampler="heun"), "CFG\\+\\+ is a rule for Euler steps, and the sampler is heun"),
        (dict(rule=CfgPlusPlus(), sampler="euler", guidance=4.0), "between 0 and 1"),
        (dict(rule=CfgPlusPlus(), sampler="euler", labels=[0, 1], guidance=[0.5, 1.5]), "between 0 and 1"),
        (dict(rule=Apg(momentum=1.0)), "momentum = 1.0"),
        (dict(rule=Apg(radius=-1.0)), "radius = -1.0"),
    ],
)
def test_steering_that_does_not_fit_is_refused(asked, says):
    with pytest.raises(Refused, match=says):
        sample(model_of(Label(), PLAIN), steps=2, **{"labels": [0], "guidance": 2.0} | asked)


def test_a_guide_that_does_not_fit_is_refused():
    model, other = model_of(Label(), PLAIN), model_of(Label(), PLAIN, DDPM())
    with pytest.raises(Refused, match="another objective"):
        sample(model, labels=[0], guide=other, guidance=2.0)
    undropped, recipe = model_of(Label(dropout=0.0), PLAIN), replace(model.recipe, conditioning=())
    unconditional = Model(build(recipe, Facts()).eval(), recipe.objective, Facts(), recipe)
    with pytest.raises(Refused, match="never trained without"):
        sample(unconditional, count=1, guide=undropped, guidance=2.0)
    with pytest.raises(Refused, match="both say what guidance moves away from: give only one"):
        sample(model, labels=[0], guide=model, guidance=2.0, negative={"labels": [1]})
    grey = model_of(Label(), replace(PLAIN, in_channels=1, out_channels=1))
    with pytest.raises(Refused, match="the guide draws images of 1 channels, and this model of 3"):
        sample(model, labels=[0], guide=grey, guidance=2.0)
    reordered = Facts(classes=("dog", "cat", "bird"))
    dogs_first = Model(build(model.recipe, reordered).eval(), model.objective, reordered, model.recipe)
    with pytest.raises(Refused, match="the guide knows other classes, or in another order"):
        sample(model, labels=[0], guide=dogs_first, guidance=2.0)


# ------------------------------------------------------------------------------------ several attributes, several scales


ATTRIBUTES = Facts(attributes=("Bald", "Male", "Smiling"))


def attribute_model(**options) -> Model:
    """A small network that reads attributes as tokens."""
    config = UNetConfig(
        channels=(16, 16),
        attention=("none", "cross"),
        heads=(2, 2),
        blocks=(1, 1),
        depth=(1, 1),
        context_width=16,
        groups=8,
        zero_init=False,
    )
    recipe = Recipe(
        name="faces", data=Shards(size=8), model=config, conditioning=(Attributes(**options),), objective=EDM()
    )
    torch.manual_seed(3)
    network = build(recipe, ATTRIBUTES).eval().requires_grad_(False)
    return Model(network, recipe.objective, ATTRIBUTES, recipe)


def test_each_attribute_is_guided_by_its_own_scale():
    """Against separate forwards of every branch: D_base + sum s_k (D_k - D_base)."""
    model, seen = attribute_model(), []
    asked = [{"Bald": 1, "Male": 0, "Smiling": 1}, {"Bald": 0, "Male": 1, "Smiling": 1}]
    scales = {"Smiling": 3.0, "Bald": 1.5}
    sample(model, attributes=asked, guidance=scales, steps=1, sampler="euler", seed=4,
           on_step=lambda i, x, denoised: seen.append(denoised))  # fmt: skip
    assert model.forwards == 3

    def branch(rows) -> torch.Tensor:
        one = []
        sample(model, attributes=rows, steps=1, sampler="euler", seed=4, on_step=lambda i, x, d: one.append(d))
        return one[0]

    base = [{"Male": row["Male"]} for row in asked]
    expected = plain = branch(base)
    for name, scale in scales.items():
        raised = branch([b | {name: row[name]} for b, row in zip(base, asked)])
        expected = expected + scale * (raised - plain)
    torch.testing.assert_close(seen[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options,asked,says",
    [
        ({}, {"guidance": {"Smiling": 2.0}, "attributes": [{"Male": 1}]}, "'Smiling', which is unknown for image 0"),
        ({}, {"guidance": {"Old": 2.0}, "attributes": [{"Male": 1}]}, "'Old' is not one of this model's"),
        ({}, {"guidance": {"Male": math.nan}, "attributes": [{"Male": 1}]}, "guidance of Male = nan"),
        ({}, {"guidance": {}, "attributes": [{"Male": 1}]}, "guidance by attribute is empty"),
        ({}, {"guidance": {"Male": 2.0}, "count": 1}, "guidance by name is for attributes"),
        ({}, {"guidance": {"Male": 2.0}, "attributes": [{"Male": 1}], "rescale": 0.5}, "does not go with"),
        ({"attribute_dropout": 0.0}, {"guidance": {"Male": 2.0}, "attributes": [{"Male": 1}]}, "attribute_dropout 0"),
    ],
)
def test_scales_that_do_not_fit_are_refused(options, asked, says):
    with pytest.raises(Refused, match=re.escape(says)):
        sample(attribute_model(**options), **asked, steps=1)


# ------------------------------------------------------------------------------------------------ how many at once


def test_images_are_drawn_again_in_smaller_chunks_where_memory_runs_out(monkeypatch):
    module = sys.modules["duotone.engine.sample"]  # the package gives the function under that name

    model, sizes, run = attribute_model(), [], module.run

    def scarce(model, denoise, solver, sigmas, seeds, *rest):
        sizes.append(len(seeds))
        if len(seeds) > 2:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return run(model, denoise, solver, sigmas, seeds, *rest)

    whole = sample(model, count=5, steps=2, seed=1)
    monkeypatch.setattr(module, "run", scarce)
    halved = sample(model, count=5, steps=2, seed=1, chunk=5)
    assert sizes == [5, 3, 2, 2, 1]
    assert np.abs(halved.astype(int) - whole.astype(int)).max() <= 1


def test_the_bar_counts_every_step_of_every_image(monkeypatch, capsys):
    sample(attribute_model(), count=3, steps=4, chunk=2, progress=True)
    assert "12.0/12.0" in capsys.readouterr().err


def test_as_many_are_drawn_at_once_as_the_free_memory_holds(monkeypatch):
    from duotone.engine import memory

    unet = attribute_model().network.unet
    row = memory.saved_by(unet.config, 8, torch.float32, False, False)
    for free, rows in ((2 * row * 5 + 1, 5), (0, 1), (2**50, memory.MOST_ROWS)):
        monkeypatch.setattr(memory, "free_on_cpu", lambda free=free: free)
        assert memory.rows_that_fit(unet, 8) == rows
