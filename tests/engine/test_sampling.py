"""Guidance against two separate forwards, seeds and refusals; what reaches the network when a condition is dropped."""

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch

from duotone.data.batch import Batch
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import draws
from duotone.engine.artifact import Model, build
from duotone.engine.conditioning.base import Facts
from duotone.engine.conditioning.image import ClassMap
from duotone.engine.conditioning.label import Label
from duotone.engine.conditioning.text import ByteText
from duotone.engine.memory import in_chunks
from duotone.engine.model.blocks import Attention
from duotone.engine.model.unet import UNetConfig
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.pictures import ByStep
from duotone.engine.recipe import Recipe
from duotone.engine.sample import Steps, sample
from duotone.engine.sampling.guidance import Guidance, GuidedDenoiser
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus, CfgPlusPlusRun
from duotone.engine.sampling.samplers.ancestral import ancestral
from duotone.engine.sampling.samplers.stochastic_heun import stochastic_heun
from duotone.engine.train import Run, conditions

CROSS = UNetConfig(
    channels=(16, 16),
    attention=("none", "cross"),
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    context_width=16,
    groups=8,
    zero_init=False,
)
PLAIN = UNetConfig(
    channels=(16, 16),
    attention=("none", "self"),
    middle="self",
    heads=(2, 2),
    blocks=(1, 1),
    depth=(1, 1),
    groups=8,
    zero_init=False,
)
FACTS = Facts(classes=("cat", "dog", "bird"))
CONDITIONS = {
    "text": (ByteText(width=16, layers=1, heads=2, length=24), CROSS, {"prompts": ["a cat", "two dogs"]}),
    "label": (Label(), PLAIN, {"labels": ["dog", 2]}),
}


def model_of(*conditions, network=PLAIN, objective=None, **facts) -> Model:
    torch.manual_seed(0)
    recipe = Recipe(name="t", data=Shards(size=8), conditioning=conditions, model=network, objective=objective or EDM())
    built = build(recipe, FACTS).eval().requires_grad_(False)
    return Model(built, recipe.objective, FACTS, recipe)


def condition(model: Model, kind: str, values: list, keep: bool):
    conditioner = model.network.conditioners[kind]
    return conditioner(conditioner.of_values(values), torch.full((len(values),), keep))


def two_forwards(model, x, sigma, kind, values, scale):
    """The plain oracle: D for each branch by itself, then the combination."""

    def d(keep):
        n = torch.full((len(x),), sigma, dtype=torch.float64)
        c = [v.float() for v in model.objective.scalings(n)]
        wide = [v[:, None, None, None] for v in c]
        with torch.inference_mode():
            f = model.network.predict(x * wide[2], c[3], condition(model, kind, values, keep))
        return wide[0] * x + wide[1] * f

    scale = torch.as_tensor(scale).view(-1, 1, 1, 1)
    return d(False) + scale * (d(True) - d(False)), d(True)


def guided(model, kind, values, scales, **settings) -> GuidedDenoiser:
    conditioner = model.network.conditioners[kind]
    n = len(values)
    keep = torch.tensor([True] * n + [False] * n)
    with torch.inference_mode():
        both = conditioner(conditioner.of_values(values * 2), keep)
    return GuidedDenoiser(model.network, model.objective, both, Guidance(scale_N=torch.tensor(scales), **settings))


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("scales", [[0.0, 0.0], [1.0, 1.0], [3.5, 3.5], [0.5, 7.0]])
@pytest.mark.parametrize("objective", [EDM(), DDPM()], ids=["edm", "ddpm"])
def test_guidance_in_one_batch_is_two_forwards(kind, scales, objective):
    config, network, asked = CONDITIONS[kind]
    model = model_of(config, network=network, objective=objective)
    values = next(iter(asked.values()))
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 3
    denoise = guided(model, kind, values, scales)
    expected, _ = two_forwards(model, x, 3.0, kind, values, scales)
    assert (denoise(x, 3.0) - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    assert denoise.forwards <= (2 if scales == [1.0, 1.0] else 4)


def test_outside_its_interval_nothing_is_doubled():
    config, network, asked = CONDITIONS["label"]
    model = model_of(config, network=network)
    x = torch.randn(2, 3, 8, 8)
    denoise = guided(model, "label", asked["labels"], [4.0, 4.0], interval=(0.5, 2.0))
    _, conditional = two_forwards(model, x, 3.0, "label", asked["labels"], [4.0, 4.0])
    torch.testing.assert_close(denoise(x, 3.0), conditional, atol=1e-5, rtol=1e-5)
    assert denoise.forwards == 2
    denoise(x, 1.0)
    assert denoise.forwards == 6


def test_a_negative_condition_takes_the_unconditional_place():
    config, network, _ = CONDITIONS["text"]
    model = model_of(config, network=network)
    settings = dict(prompts=["a cat"], guidance=3.0, steps=3, sampler="euler")
    plain = sample(model, **settings)
    empty = sample(model, **settings, negative={"prompts": ["a dog with spots"]})
    assert not np.array_equal(plain, empty)
    # A negative equal to the prompt leaves nothing to steer by: guidance 3 is then guidance 1.
    same = sample(model, **settings, negative={"prompts": ["a cat"]})
    unguided = sample(model, **settings | {"guidance": 1.0})
    assert np.abs(same.astype(int) - unguided).max() <= 1


@pytest.mark.parametrize("kind", CONDITIONS)
def test_a_negative_condition_is_two_forwards(kind):
    """D(negative) + scale (D(asked) - D(negative)) after an Euler step, each D by a separate forward; a scale per image."""
    config, network, asked = CONDITIONS[kind]
    model, seen = model_of(config, network=network), []
    ((name, values),) = asked.items()
    other = {"prompts": ["something else", "x"], "labels": [0, 1]}[name]
    settings = dict(guidance=[4.0, 1.5], sampler="euler", steps=2, negative={name: other})
    sample(model, **asked, **settings, on_step=lambda i, x, d: seen.append((x, d)))
    x, sigma = seen[0][0], model.objective.sampling_sigmas(2)[1].item()
    _, wanted = two_forwards(model, x, sigma, kind, values, [1.0, 1.0])
    _, unwanted = two_forwards(model, x, sigma, kind, other, [1.0, 1.0])
    expected = unwanted + torch.tensor([4.0, 1.5]).view(2, 1, 1, 1) * (wanted - unwanted)
    assert (seen[1][1] - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_keys_and_values_of_a_text_are_projected_once_a_run(monkeypatch):
    """Once for both branches together, whatever the number of steps, even if some steps need only one branch."""
    config, network, asked = CONDITIONS["text"]
    model, projected = model_of(config, network=network), []
    own = Attention.keys_values
    monkeypatch.setattr(Attention, "keys_values", lambda self, c: projected.append(len(c)) or own(self, c))
    attentions = len(list(model.network.unet.cross_attentions()))
    for steps in (2, 7):
        projected.clear()
        sample(model, **asked, guidance=3.0, steps=steps, interval=(0.0, 1.0))
        assert projected == [4] * attentions
        assert model.evaluations == 2 * steps - 1


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "ancestral", "stochastic_heun"])
def test_an_image_depends_on_its_seed_not_on_its_batch(sampler):
    config, network, _ = CONDITIONS["label"]
    model = model_of(config, network=network)
    settings = dict(steps=4, sampler=sampler, guidance=2.0)
    together = sample(model, labels=[0, 1, 2], seed=[5, 6, 7], **settings)
    alone = np.concatenate([sample(model, labels=[k], seed=[5 + k], **settings) for k in range(3)])
    chunked = sample(model, labels=[0, 1, 2], seed=[5, 6, 7], chunk=2, **settings)
    assert np.abs(together.astype(int) - alone).max() <= 1
    assert np.abs(together.astype(int) - chunked).max() <= 1
    assert not np.array_equal(together, sample(model, labels=[0, 1, 2], seed=[8, 9, 10], **settings))


@pytest.mark.parametrize("sampler", [ancestral, stochastic_heun])
def test_noise_is_bit_identical_whatever_the_batch(sampler):
    """The noise that a sampler gets at the start and in every step: alone, in a batch, in chunks, from one seed."""
    model = model_of(Label())

    def noise_of(**asked) -> torch.Tensor:
        chunks = []

        def watched(denoise, x_NCHW, sigmas, *, noise, on_step=None):
            drawn = [x_NCHW]
            chunks.append(drawn)
            told = lambda step: drawn.append(noise(step)) or drawn[-1]  # noqa: E731
            return sampler(denoise, x_NCHW, sigmas, noise=told)

        sample(model, steps=4, sampler=watched, **asked)
        return torch.cat([torch.stack(drawn, 1) for drawn in chunks])

    together = noise_of(labels=[0, 1, 2], seed=[5, 6, 7])
    assert together.shape[1] >= 4
    for i, seed in enumerate((5, 6, 7)):
        assert torch.equal(noise_of(labels=[i], seed=[seed])[0], together[i])
        assert torch.equal(noise_of(labels=[i], seed=[seed], guidance=3.0)[0], together[i])
    assert torch.equal(noise_of(labels=[0, 1, 2], seed=[5, 6, 7], chunk=2), together)
    five, three = noise_of(labels=[0] * 5, seed=9), noise_of(labels=[0] * 3, seed=9)
    assert torch.equal(five[:3], three) and not torch.equal(five[0], five[1])


def test_a_side_that_would_shrink_to_nothing_is_refused():
    """Padding only at the ends leaves no pixel of a side shorter than the factor; padding on all sides leaves one."""
    padded = replace(PLAIN, down_pads_ends=True)
    with pytest.raises(
        Refused, match=r"size = \(8, 1\): this network halves sides down to a pixel of 2: give that many"
    ):
        sample(model_of(Label(), network=padded), labels=[0], steps=1, sampler="euler", size=(8, 1))
    for network, side in ((PLAIN, 1), (padded, 2)):
        drawn = sample(model_of(Label(), network=network), labels=[0], steps=1, sampler="euler", size=(8, side))
        assert drawn.shape == (1, 8, side, 3)


def test_any_size_and_ddpm_spacings():
    model = model_of(Label(), objective=DDPM())
    assert sample(model, labels=[0], steps=1, sampler="euler", size=np.int64(12)).shape == (1, 12, 12, 3)
    for spacing in ("leading", "trailing", "linspace", "karras", "log-linear"):
        assert sample(model, labels=[0], steps=3, spacing=spacing, sampler="euler", size=(12, 20)).shape == (
            1,
            12,
            20,
            3,
        )


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (dict(labels=[0], sampler="euler9"), "sampler 'euler9' is unknown: there are euler"),
        (dict(labels=[0], spacing="trailing"), "spacing 'trailing' is unknown to EDM: there are karras, log-linear"),
        (dict(labels=[0], steps=0), "steps = 0"),
        (dict(labels=["wolf"]), "'wolf' is no class"),
        (dict(labels=[3]), "3 is no class"),
        (dict(prompts=["a cat"]), "takes no prompts: it takes labels"),
        (dict(labels=[0], negative={"prompts": ["x"]}, guidance=2.0), "takes no prompts"),
        (dict(labels=[0], guidance=[1.0, 2.0]), "guidance has 2 entries for 1 images"),
        (dict(labels=[0], seed=[1, 2]), "seed has 2 entries"),
        (dict(labels=[]), "list is empty"),
        (dict(), "nothing to sample"),
        (dict(count=2, guidance=2.0), "guidance needs a condition"),
        (dict(labels="cat"), r"labels = 'cat' is one string: give a list with an entry per image, as in \['cat'\]"),
        (dict(labels=["cat"], negative={"labels": "dog"}, guidance=2.0), "labels = 'dog' is one string"),
        (dict(labels=[0], guidance=float("inf")), "guidance = inf: give finite numbers"),
        (dict(labels=[0], interval=(2.0, 1.0), guidance=2.0), r"interval = \(2.0, 1.0\)"),
        (dict(labels=[0], chunk=-1), "chunk = -1"),
        (dict(labels=[0], steps=2.5), "steps = 2.5: it must be a whole number"),
        (dict(labels=[0], size=(8,)), r"size = \(8,\): give one side, or height and width"),
        (dict(labels=[0], size=8.5), "size: a side = 8.5: it must be a whole number"),
        (dict(labels=[0], size=0), "size: a side = 0: it must be a whole number, at least 1"),
        (dict(count=1.5), "count = 1.5: it must be a whole number"),
        (dict(labels=[0], chunk=1.5), "chunk = 1.5: it must be a whole number"),
        (dict(labels=[0], seed=1.5), "seed = 1.5: give a whole number"),
        (dict(labels=[0], seed="1"), "seed = '1': give a whole number"),
        (dict(labels=[0], seed=[1.5]), r"seed = \[1.5\]: give a whole number"),
        (dict(labels=[0], guidance=None), "guidance = None: give one number, or one per image"),
        (dict(labels=[0], guidance=["much"]), "guidance = .*give one number, or one per image"),
        (dict(labels=[0], rescale=None), "rescale = None"),
        (dict(labels=[0], interval=None), "interval = None: give two noise levels"),
        (dict(labels=[0], guide="runs/x", guidance=2.0), "guide is of type str: give a Model, as load"),
        (dict(labels=[0], rule="apg"), "rule = 'apg': give one of engine/sampling/guiding"),
        (dict(labels=[0], negative=[1], guidance=2.0), "negative = .*give it by name"),
    ],
)
def test_what_does_not_fit_is_refused(asked, says):
    with pytest.raises(Refused, match=says):
        sample(model_of(Label()), **{"steps": 2} | asked)


def test_the_path_of_a_model_is_no_model():
    with pytest.raises(Refused, match=r"model is of type str: give a Model, as load\(path\) returns one"):
        sample("runs/x/ema.safetensors", count=1)


@pytest.mark.parametrize(
    ("objective", "settings", "within"),
    [
        (DDPM(schedule="cosine"), {}, True),
        (DDPM(schedule="cosine"), {"clip": False}, False),
        (DDPM(schedule="cosine"), {"rule": CfgPlusPlus(), "guidance": 0.6, "sampler": "euler"}, False),
        (EDM(sigma_data=8.0), {}, False),
        (EDM(sigma_data=8.0), {"clip": True}, True),
    ],
    ids=["ddpm", "ddpm, not", "cfg++", "edm", "edm, asked"],
)
def test_denoised_images_stay_within_the_range_of_pixels(objective, settings, within):
    """By default for DDPM: a cosine schedule's first noise level multiplies the network's error by 20,000."""
    model, largest = model_of(Label(), objective=objective), []
    watch = lambda step, x_NCHW, denoised_NCHW: largest.append(denoised_NCHW.abs().max().item())  # noqa: E731
    sample(model, labels=[0, 1], **{"steps": 4, "sampler": "ancestral", "guidance": 3.0} | settings, on_step=watch)
    assert (max(largest) <= 1) == within


@pytest.mark.parametrize(("clip", "within"), [(None, True), (False, False)])
def test_of_cfg_plus_plus_the_predictions_are_clipped_that_it_combines(clip, within, monkeypatch):
    largest, combine = [], CfgPlusPlusRun.__call__

    def watched(self, conditional_NCHW, unconditional_NCHW, scale_N, sigma):
        largest.extend(d.abs().max().item() for d in (conditional_NCHW, unconditional_NCHW))
        return combine(self, conditional_NCHW, unconditional_NCHW, scale_N, sigma)

    monkeypatch.setattr(CfgPlusPlusRun, "__call__", watched)
    asked = {"labels": [0], "steps": 4, "guidance": 0.6, "sampler": "euler", "clip": clip}
    sample(model_of(Label(), objective=DDPM(schedule="cosine")), **asked, rule=CfgPlusPlus())
    assert (max(largest) <= 1) == within


def test_where_cfg_plus_plus_does_not_act_the_one_prediction_is_clipped():
    model, largest = model_of(Label(), objective=DDPM(schedule="cosine")), []
    asked = {"labels": [0], "steps": 4, "guidance": 0.6, "sampler": "euler", "interval": (0.0, 0.0)}
    watch = lambda step, x_NCHW, denoised_NCHW: largest.append(denoised_NCHW.abs().max().item())  # noqa: E731
    sample(model, **asked, rule=CfgPlusPlus(), on_step=watch)
    assert max(largest) <= 1


def test_whole_numbers_of_numpy_are_whole_numbers():
    model, numbers = model_of(Label()), dict(steps=1, seed=3, size=8, chunk=1)
    expected = sample(model, labels=["dog", "cat"], **numbers)
    drawn = sample(model, labels=np.array([1, 0]), **{name: np.int64(value) for name, value in numbers.items()})
    assert np.array_equal(drawn, expected)


def test_a_churn_below_nothing_is_refused():
    with pytest.raises(Refused, match="churn = -1.5: it must be at least 0"):
        sample(model_of(Label()), labels=[0], steps=2, sampler=functools.partial(stochastic_heun, churn=-1.5))


def test_guidance_without_a_null_state_is_refused_with_the_reason():
    undropped = model_of(Label(dropout=0.0))
    with pytest.raises(Refused, match="condition dropout 0"):
        sample(undropped, labels=[0], guidance=2.0, steps=2)
    assert not undropped.can_be_guided and not model_of().can_be_guided
    half = model_of(Label(), ClassMap(dropout=0.0), network=replace(PLAIN, extra_channels=4))
    assert model_of(Label()).can_be_guided and not half.can_be_guided


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_condition_that_was_never_left_out_must_be_given(guidance):
    """Its null condition is an untrained row of random numbers."""
    both = model_of(CONDITIONS["text"][0], Label(dropout=0.0), network=CONDITIONS["text"][1])
    for asked in ({"count": 1}, {"prompts": ["x"], "guidance": guidance}):
        with pytest.raises(Refused, match="never trained without its labels: give labels"):
            sample(both, **asked, steps=1)
    assert not both.can_draw_unconditionally and model_of(Label()).can_draw_unconditionally


def test_a_null_state_that_was_trained_with_all_others_alone_is_no_state_of_its_own():
    """Conditions dropped together give guidance its other branch, but one without the other was never seen."""
    both = model_of(CONDITIONS["text"][0], Label(dropout=0.0), network=CONDITIONS["text"][1])
    both = replace(both, recipe=replace(both.recipe, drop_together=0.1))
    assert both.can_be_guided and both.can_draw_unconditionally
    sample(both, count=1, steps=1)
    sample(both, prompts=["x"], labels=[0], guidance=2.0, steps=1)
    with pytest.raises(Refused, match="never trained without its labels alone: give labels"):
        sample(both, prompts=["x"], steps=1)
    with pytest.raises(Refused, match="condition dropout 0 for its labels"):
        sample(both, prompts=["x"], labels=[0], guidance=2.0, steps=1, negative={"prompts": ["y"]})


@pytest.mark.parametrize("sampler", ["euler", "heun"])
def test_steps_are_told_once_for_each_image_whatever_the_chunks(sampler):
    model, asked = model_of(Label()), {"labels": [0, 1, 2, 0, 1], "steps": 3, "sampler": sampler, "seed": 4}
    whole, parts = ByStep(), ByStep()
    sample(model, **asked, on_step=whole)
    sample(model, **asked, chunk=2, on_step=parts)
    assert len(whole.images) == 3
    for one, other in zip(whole.images, parts.images, strict=True):
        assert np.abs(one.astype(int) - other).max() <= 1


def test_a_chunk_that_runs_out_of_memory_tells_no_step_twice():
    """Five images fail at their second step, as they do where guidance begins; then three and two succeed."""
    told, bars = [], Steps(10, lambda step, x, denoised: told.append((step, x.tolist())), shown=False)

    def draw(rows: slice, on_step):
        x = torch.arange(5)[rows]
        for step in range(2):
            if step == 1 and len(x) > 3:
                raise torch.cuda.OutOfMemoryError
            on_step(step, x, x)
        return x.numpy()

    assert in_chunks(lambda rows: draw(rows, bars.of(rows)), 5, 5).tolist() == [0, 1, 2, 3, 4]
    assert told == [(0, [0, 1, 2, 3, 4]), (1, [0, 1, 2]), (1, [3, 4])]


def test_sigmas_that_do_not_fall_are_refused():
    with pytest.raises(Refused, match="must fall"):
        sample(model_of(Label(), objective=DDPM(steps=4)), labels=[0], steps=9, spacing="leading", sampler="euler")


def test_a_caption_too_long_is_cut_with_a_warning():
    config, network, _ = CONDITIONS["text"]
    with pytest.warns(UserWarning, match="cut: 'and a very long tail'"):
        sample(
            model_of(config, network=network),
            prompts=["0123456789abcdefghij, and a very long tail"],
            steps=1,
            sampler="euler",
        )


def test_drop_rate_counted_at_the_networks_input():
    """10 % of the rows reach the UNet with all-zero tokens and 20 % with the null class, drawn independently."""
    config = ByteText(width=16, layers=1, heads=2, length=24, dropout=0.1, pooled=False)
    model = model_of(config, Label(dropout=0.2), network=CROSS)
    seen = []
    model.network.unet.register_forward_pre_hook(lambda m, a: seen.append(a))
    null = model.network.conditioners["label"].embedding.weight[-1]

    class FakeSharded:  # conditions() only asks where the network is
        device = torch.device("cpu")

    n = 4000
    batch = Batch(
        positions_N=np.arange(n),
        keys=["k"] * n,
        images_NHWC=torch.zeros(n, 8, 8, 3, dtype=torch.uint8),
        captions=["a cat"] * n,
        labels_N=torch.zeros(n, dtype=torch.int64),
    )
    run = Run(model.recipe, None, None, None, FACTS, model.network, FakeSharded())
    tensors, keep = conditions(run, batch)
    with torch.no_grad():
        model.network(torch.zeros(n, 3, 4, 4), torch.zeros(n), tensors, keep)
    no_text = (seen[0][3] == 0).flatten(1).all(1)
    no_label = (seen[0][2] == null).all(1)
    assert no_text.float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert no_label.float().mean().item() == pytest.approx(0.2, abs=0.02)
    assert (no_text & no_label).float().mean().item() == pytest.approx(0.02, abs=0.01)


def test_draws_are_functions_of_seed_position_and_purpose():
    positions = np.arange(100)
    a = draws.normal(0, positions, draws.Purpose.NOISE, 12)
    assert torch.equal(a[50:], draws.normal(0, positions[50:], draws.Purpose.NOISE, 12))
    assert not torch.equal(a, draws.normal(1, positions, draws.Purpose.NOISE, 12))
    assert not torch.equal(a, draws.normal(0, positions, draws.Purpose.SAMPLE_START, 12))
    plan, tail = draws.plan(0, positions, 40), draws.plan(0, positions[40:], 40)
    assert sorted(plan.samples_N[:40]) == list(range(40)) and sorted(plan.samples_N[40:80]) == list(range(40))
    assert (plan.samples_N[40:] == tail.samples_N).all() and (plan.crops_N2[40:] == tail.crops_N2).all()
    u = draws.uniform(0, np.arange(20_000), draws.Purpose.DROP)[:, 0]
    assert u.mean().item() == pytest.approx(0.5, abs=0.01) and u.var().item() == pytest.approx(1 / 12, abs=0.003)


def test_ranks_and_micro_batches_cover_a_step_once():
    for ranks, micro in ((1, 24), (2, 6), (4, 2)):
        parts = [p for rank in range(ranks) for p in draws.micro_batches(48, 24, micro, rank, ranks)]
        assert np.concatenate(parts).tolist() == list(range(48, 72))
