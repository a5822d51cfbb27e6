"""Objectives against the papers' own forms in float64, and samplers against diffusers' schedulers."""

import math

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from duotone.data.refusal import Refused
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow
from duotone.engine.sampling.samplers.ancestral import ancestral
from duotone.engine.sampling.samplers.clipping import clipped
from duotone.engine.sampling.samplers.dpmpp_2m import dpmpp_2m
from duotone.engine.sampling.samplers.epsilon_scaling import epsilon_scaled
from duotone.engine.sampling.samplers.euler import euler
from duotone.engine.sampling.samplers.heun import heun
from duotone.engine.sampling.samplers.stochastic_heun import stochastic_heun

THEIRS = {
    "linear": ("linear", 1e-4, 0.02),
    "scaled_linear": ("scaled_linear", 0.00085, 0.012),
    "cosine": ("squaredcos_cap_v2", 1e-4, 0.02),
}
PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}


def drawn(n: int = 6):
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand(n, 1, 4, 4, generator=g, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(x0.shape, generator=g, dtype=torch.float64), torch.rand(n, generator=g, dtype=torch.float64)


def mixed(objective, x0, noise, sigma):
    a, b, p, q = (c[:, None, None, None] for c in objective.coefficients(sigma).unbind(1))
    return a * x0 + b * noise, p * x0 + q * noise


@pytest.mark.parametrize("schedule", THEIRS)
def test_schedule_is_diffusers(schedule):
    name, start, end = THEIRS[schedule]
    theirs = DDPMScheduler(1000, beta_schedule=name, beta_start=start, beta_end=end).alphas_cumprod.double()
    ours = 1 / (1 + DDPM(schedule=schedule).sigmas.square())
    assert (ours - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_input_target_and_time_are_the_papers(prediction):
    """Ho et al. 2020, equation 4; Salimans and Ho 2022, appendix D: v = alpha noise - sigma x0."""
    objective = DDPM(prediction=prediction)
    x0, noise, u = drawn()
    sigma = objective.draw_sigma(u)
    t = (u * 1000).long()
    bar = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64).neg().add(1).cumprod(0)[t][:, None, None, None]
    scaled, target = mixed(objective, x0, noise, sigma)
    paper = {"epsilon": noise, "x0": x0, "v": bar.sqrt() * noise - (1 - bar).sqrt() * x0}[prediction]
    torch.testing.assert_close(scaled, bar.sqrt() * x0 + (1 - bar).sqrt() * noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(target, paper, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(objective.scalings(sigma).noise_N, t.double(), rtol=0, atol=1e-6)


def test_every_timestep_is_trained():
    objective = DDPM(steps=50)
    sigma = objective.draw_sigma((torch.arange(5000, dtype=torch.float64) + 0.5) / 5000)
    assert objective.scalings(sigma).noise_N.round().long().bincount(minlength=50).tolist() == [100] * 50


@pytest.mark.parametrize("weighting", ["simple", "snr", "min_snr", "soft_min_snr"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddpm_weights(prediction, weighting):
    """The loss for a fixed wrong output, against the papers' formulas."""
    objective = DDPM(prediction=prediction, weighting=weighting, schedule="cosine")
    x0, noise, u = drawn()
    sigma = objective.draw_sigma(u)
    _, target = mixed(objective, x0, noise, sigma)
    output = target + 0.3 * torch.randn(target.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    snr = 1 / sigma.square()
    per_x0 = {  # Hang et al. 2023, section 3.4: weights of the x0 loss and what they become for noise and velocity
        "epsilon": {
            "simple": snr / snr,
            "snr": torch.ones_like(snr),
            "min_snr": snr.clamp(max=5) / snr,
            "soft_min_snr": 5 / (snr + 5),
        },
        "x0": {"simple": snr / snr, "snr": snr, "min_snr": snr.clamp(max=5), "soft_min_snr": 5 * snr / (snr + 5)},
        "v": {
            "simple": snr / snr,
            "snr": snr / (snr + 1),
            "min_snr": snr.clamp(max=5) / (snr + 1),
            "soft_min_snr": 5 * snr / (snr + 5) / (snr + 1),
        },
    }
    paper = (per_x0[prediction][weighting] * (output - target).square().mean((1, 2, 3))).mean()
    assert objective(output.float(), target.float(), sigma).item() == pytest.approx(paper.item(), rel=1e-5)


def test_edm_loss_is_the_papers():
    """Karras et al. 2022, equations 2 and 8 with table 1: weight (sigma^2 + sd^2) / (sigma sd)^2 on |D - x0|^2."""
    objective, sd = EDM(sigma_data=0.6), 0.6
    x0, noise, u = drawn()
    sigma = objective.draw_sigma(u)
    s = sigma[:, None, None, None]
    network = lambda x: 0.7 * x - 0.1  # noqa: E731
    x = x0 + s * noise
    c_in = 1 / (s**2 + sd**2).sqrt()
    d = sd**2 / (s**2 + sd**2) * x + s * sd / (s**2 + sd**2).sqrt() * network(c_in * x)
    paper = ((s**2 + sd**2) / (s * sd) ** 2 * (d - x0).square()).mean()
    scaled, target = mixed(objective, x0, noise, sigma)
    assert objective(network(scaled).float(), target.float(), sigma).item() == pytest.approx(paper.item(), rel=1e-5)
    torch.testing.assert_close(objective.scalings(sigma).noise_N, sigma.log() / 4)
    assert sigma.log().mean().item() == pytest.approx(-1.2, abs=1.0)


def test_edm_sigmas_follow_the_log_normal():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logs = EDM(sigma_min=1e-9, sigma_max=1e9).draw_sigma(u).log()
    assert logs.mean().item() == pytest.approx(-1.2, abs=1e-3)
    assert logs.std().item() == pytest.approx(1.2, abs=1e-2)


@pytest.mark.parametrize("objective", [EDM(), *(DDPM(prediction=p, schedule="cosine") for p in PREDICTIONS)], ids=str)
def test_a_perfect_output_denoises_to_the_image(objective):
    x0, noise, u = drawn()
    sigma = objective.draw_sigma(u * 0.9)
    _, target = mixed(objective, x0, noise, sigma)
    c = [v[:, None, None, None] for v in objective.scalings(sigma)]
    x = x0 + sigma[:, None, None, None] * noise
    torch.testing.assert_close(c[0] * x + c[1] * target, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss", ["squared", "absolute", "huber"])
def test_penalties(loss):
    a, b = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4) * 2
    theirs = {"squared": torch.nn.MSELoss, "absolute": torch.nn.L1Loss, "huber": torch.nn.HuberLoss}[loss]()
    torch.testing.assert_close(EDM(loss=loss).penalty(a, b).mean(), theirs(a, b))


# ---------------------------------------------------------------------------------------------------- samplers


def bounded(x, sigma):
    """A well-behaved denoiser that depends on x and sigma."""
    return torch.tanh(x / math.sqrt(1 + sigma**2)) * 0.8


def their_trajectory(scheduler, steps, prediction, noises, denoise=bounded):
    """diffusers' states in variance-preserving scale, for the same denoiser and noise."""
    scheduler.set_timesteps(steps)
    x, states = noises[0], []
    bars = scheduler.alphas_cumprod.double()
    for i, t in enumerate(scheduler.timesteps):
        bar = bars[t]
        sigma = ((1 - bar) / bar).sqrt().item()
        d = denoise(x / bar.sqrt(), sigma)
        model_output = {"epsilon": (x - bar.sqrt() * d) / (1 - bar).sqrt(), "x0": d}[prediction]
        if isinstance(scheduler, DDPMScheduler):
            step = noised_step(scheduler, model_output, t, x, noises[i + 1])
        else:
            step = scheduler.step(model_output, t, x, use_clipped_model_output=True).prev_sample
        x = step
        states.append(x)
    return states


def noised_step(scheduler, output, t, x, noise):
    import diffusers.schedulers.scheduling_ddpm as module

    original = module.randn_tensor
    module.randn_tensor = lambda *a, **k: noise
    try:
        return scheduler.step(output, t, x).prev_sample
    finally:
        module.randn_tensor = original


@pytest.mark.parametrize("schedule", THEIRS)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("trailing", 50), ("trailing", 25), ("leading", 1000)])
@pytest.mark.parametrize("kind", ["ddim", "ddpm", "ddim clipped", "ddpm clipped"])
def test_whole_trajectories_equal_diffusers(schedule, spacing, steps, kind):
    """In variance-preserving scale within 1e-4, clipped 2e-4; cosine with trailing spacing 5e-4, their fp32's error."""
    name, start, end = THEIRS[schedule]
    kind, _, clip = kind.partition(" ")
    settings = dict(beta_schedule=name, beta_start=start, beta_end=end, timestep_spacing=spacing)
    settings |= dict(clip_sample=bool(clip))
    cls = DDIMScheduler if kind == "ddim" else DDPMScheduler
    scheduler = cls(1000, **settings, **({"set_alpha_to_one": True} if kind == "ddim" else {}))
    g = torch.Generator().manual_seed(0)
    noises = [torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(steps + 1)]
    denoise = (lambda x, sigma: bounded(x, sigma) + 0.4) if clip else bounded  # up to 1.2
    theirs = their_trajectory(scheduler, steps, "epsilon", noises, denoise)
    sigmas = DDPM(schedule=schedule).sampling_sigmas(steps, spacing)
    ours = []
    # Their start is noise of variance 1, ours is x0 + sigma noise: in variance-preserving scale both are the same.
    x = noises[0] * (1 + sigmas[0] ** 2).sqrt()
    solver = euler if kind == "ddim" else ancestral
    solver = clipped(solver) if clip else solver
    solver(denoise, x, sigmas, noise=lambda i: noises[i + 1], on_step=lambda i, x, d: ours.append(x))
    tolerance = 5e-4 if (schedule, spacing) == ("cosine", "trailing") else 2e-4 if clip else 1e-4
    for i, (a, b) in enumerate(zip(ours, theirs)):
        a = a / (1 + sigmas[i + 1] ** 2).sqrt()
        assert (a - b).abs().max() <= tolerance, i


@pytest.mark.parametrize("steps", [10, 25])
def test_dpmpp_2m_equals_diffusers(steps):
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        timestep_spacing="trailing",
        solver_order=2,
        lower_order_final=False,
        final_sigmas_type="zero",
        euler_at_final=True,
    )
    scheduler.set_timesteps(steps)
    g = torch.Generator().manual_seed(0)
    start = torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64)
    x, theirs = start, []
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].double()
        alpha = 1 / (1 + sigma**2).sqrt()
        d = bounded(x / alpha, sigma.item())
        x = scheduler.step((x - alpha * d) / (sigma * alpha), t, x).prev_sample
        theirs.append(x)
    sigmas, ours = scheduler.sigmas.double(), []
    dpmpp_2m(bounded, start * (1 + sigmas[0] ** 2).sqrt(), sigmas, on_step=lambda i, x, d: ours.append(x))
    for i, (a, b) in enumerate(zip(ours, theirs)):
        assert (a / (1 + sigmas[i + 1] ** 2).sqrt() - b).abs().max() <= 1e-4, i


def edm_output(scheduler, x, sigma):
    """The network output from which diffusers' preconditioning makes the denoised image of `bounded`."""
    c_skip = 0.25 / (sigma**2 + 0.25)
    c_out = sigma * 0.5 / math.sqrt(sigma**2 + 0.25)
    return (bounded(x, sigma) - c_skip * x) / c_out


@pytest.mark.parametrize("steps", [9, 30])
@pytest.mark.parametrize(
    ("cls", "solver", "settings"),
    [
        (EDMEulerScheduler, euler, {}),
        (EDMDPMSolverMultistepScheduler, dpmpp_2m, {"lower_order_final": False, "final_sigmas_type": "zero"}),
    ],
    ids=["euler", "dpmpp_2m"],
)
def test_edm_trajectories_equal_diffusers(cls, solver, settings, steps):
    """diffusers' own noise levels (karras, rho 7), network scale and steps; errors are in variance-preserving scale."""
    scheduler = cls(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, **settings)
    scheduler.set_timesteps(steps)
    sigmas = EDM().sampling_sigmas(steps)
    torch.testing.assert_close(sigmas, scheduler.sigmas.double(), rtol=1e-5, atol=1e-7)
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 80
    x, theirs, ours = start, [], []
    for i, t in enumerate(scheduler.timesteps):
        scheduler.scale_model_input(x, t)
        x = scheduler.step(edm_output(scheduler, x, scheduler.sigmas[i].item()), t, x).prev_sample.double()
        theirs.append(x)
    solver(bounded, start, sigmas, on_step=lambda i, x, d: ours.append(x))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).abs().max() / (1 + sigmas[i + 1] ** 2).sqrt() <= 1e-4, i


@pytest.mark.parametrize("karras", [False, True])
def test_heun_equals_diffusers(karras):
    """With linspace, here at whole timesteps (999 / 27 = 37), and with karras levels over the same table."""
    steps = 28
    scheduler = HeunDiscreteScheduler(
        1000, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, use_karras_sigmas=karras
    )
    scheduler.set_timesteps(steps)
    sigmas = DDPM(schedule="scaled_linear").sampling_sigmas(steps, "karras" if karras else "linspace")
    theirs_sigmas = torch.cat([scheduler.sigmas[:1], scheduler.sigmas[1:-1:2], scheduler.sigmas[-1:]]).double()
    torch.testing.assert_close(sigmas, theirs_sigmas, rtol=2e-4, atol=1e-6)
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    x, theirs, ours = start, [], []
    for i, t in enumerate(scheduler.timesteps):
        sigma = scheduler.sigmas[i].item()
        x = scheduler.step((x - bounded(x, sigma)) / sigma, t, x).prev_sample.double()
        if i % 2 or i == len(scheduler.timesteps) - 1:
            theirs.append(x)
    heun(bounded, start, theirs_sigmas, on_step=lambda i, x, d: ours.append(x))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a - b).abs().max() / (1 + sigmas[i + 1] ** 2).sqrt() <= 1e-4, i


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "karras"])
def test_spacings_are_diffusers(spacing):
    karras = spacing == "karras"
    scheduler = EulerDiscreteScheduler(
        1000,
        use_karras_sigmas=karras,
        timestep_spacing="linspace" if karras else spacing,
        beta_end=0.02,
        beta_start=1e-4,
    )
    scheduler.set_timesteps(28)
    torch.testing.assert_close(
        DDPM().sampling_sigmas(28, spacing).float(), scheduler.sigmas.cpu(), rtol=1e-4, atol=1e-6
    )


def test_log_linear_levels_rise_by_one_factor():
    for objective in (EDM(), DDPM(), Flow()):
        sigmas = objective.sampling_sigmas(9, "log-linear")
        ratios = sigmas[1:-1] / sigmas[:-2]
        torch.testing.assert_close(ratios, ratios[:1].expand(8))
        assert sigmas[-1] == 0


def edm_algorithm_2(denoise, x, t, fresh, churn, low, high, scale):
    """Karras et al. 2022, algorithm 2, line by line, in float64 and in the paper's names."""
    steps = len(t) - 1
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= t[i] <= high else 0.0
        epsilon = scale * fresh(i)
        t_hat = t[i] + gamma * t[i]
        x_hat = x + math.sqrt(t_hat**2 - t[i] ** 2) * epsilon
        d = (x_hat - denoise(x_hat, t_hat)) / t_hat
        x = x_hat + (t[i + 1] - t_hat) * d
        if t[i + 1] != 0:
            d_next = (x - denoise(x, t[i + 1])) / t[i + 1]
            x = x_hat + (t[i + 1] - t_hat) * (d / 2 + d_next / 2)
    return x


@pytest.mark.parametrize(
    ("churn", "low", "high", "scale"),
    [(0.0, 0.0, math.inf, 1.0), (math.inf, 0.0, math.inf, 1.0), (30.0, 0.05, 50.0, 1.003), (4.0, 0.5, 2.0, 1.1)],
    ids=["none", "full at every step", "the paper's", "narrow"],
)
def test_stochastic_heun_is_the_papers_algorithm(churn, low, high, scale):
    sigmas = EDM().sampling_sigmas(18)
    g = torch.Generator().manual_seed(3)
    noises = torch.randn(19, 2, 1, 4, 4, generator=g, dtype=torch.float64)
    fresh = lambda i: noises[i + 1]  # noqa: E731
    expected = edm_algorithm_2(bounded, noises[0] * 80, sigmas.tolist(), fresh, churn, low, high, scale)
    settings = dict(churn=churn, churn_from=low, churn_to=high, noise_scale=scale)
    got = stochastic_heun(bounded, noises[0] * 80, sigmas, noise=fresh, **settings)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    if churn == 0:
        torch.testing.assert_close(heun(bounded, noises[0] * 80, sigmas), expected, rtol=1e-9, atol=1e-9)


MEANS, WEIGHTS, SPREAD = (
    torch.tensor([-0.7, 0.1, 0.8], dtype=torch.float64),
    torch.tensor([0.3, 0.2, 0.5], dtype=torch.float64),
    0.15,
)


def mixture(x, sigma):
    """The exact denoiser of a Gaussian mixture."""
    variance = SPREAD**2 + sigma**2
    log_w = WEIGHTS.log() - (x[..., None] - MEANS) ** 2 / (2 * variance)
    each = MEANS + SPREAD**2 / variance * (x[..., None] - MEANS)
    return (log_w.softmax(-1) * each).sum(-1)


@pytest.mark.parametrize(("solver", "order"), [(euler, 1), (heun, 2), (dpmpp_2m, 2)])
def test_order_of_convergence_on_a_gaussian_mixture(solver, order):
    x = torch.linspace(-2, 2, 41, dtype=torch.float64) * 10
    ends = {}
    for steps in (64, 128, 4096):
        sigmas = torch.logspace(1, -2, steps + 1, dtype=torch.float64)
        ends[steps] = solver(mixture, x, sigmas)
    error = [(ends[n] - ends[4096]).abs().mean().item() for n in (64, 128)]
    assert math.log2(error[0] / error[1]) == pytest.approx(order, abs=0.35)


def test_stochastic_heun_without_churn_is_heun_and_with_it_keeps_the_distribution():
    sigmas = EDM().sampling_sigmas(32)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, generator=g, dtype=torch.float64) * sigmas[0]
    fresh = lambda i: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    assert torch.equal(stochastic_heun(mixture, x, sigmas, noise=fresh, churn=0.0), heun(mixture, x, sigmas))
    churned = stochastic_heun(mixture, x, sigmas, noise=fresh)
    mean = (WEIGHTS * MEANS).sum()
    variance = (WEIGHTS * (MEANS**2 + SPREAD**2)).sum() - mean**2
    assert churned.mean().item() == pytest.approx(mean.item(), abs=0.03)
    assert churned.var().item() == pytest.approx(variance.item(), rel=0.05)


@pytest.mark.parametrize("solver", [euler, heun, dpmpp_2m, ancestral, stochastic_heun])
def test_a_small_error_stays_small_from_the_noise_of_a_cosine_schedule(solver):
    """A denoiser off by 0.05, with the other sign below 100, draws images: the first step goes from 20,000 to 10."""
    sigmas = DDPM(schedule="cosine").sampling_sigmas(20)
    g = torch.Generator().manual_seed(0)
    start = torch.randn(4096, generator=g, dtype=torch.float64) * sigmas[0]
    fresh = lambda i: torch.randn(start.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)  # noqa: E731
    wrong = lambda x, s: mixture(x, s) + (0.05 if s < 100 else -0.05)  # noqa: E731
    exact, drawn = (solver(denoise, start, sigmas, noise=fresh) for denoise in (mixture, wrong))
    assert 0 < (drawn - exact).abs().mean() < 0.25


def test_epsilon_scaling_divides_the_noise_of_ddim():
    """Song et al. 2021, equation 12 without fresh noise, by hand, with epsilon / factor in both places."""
    sigmas = torch.tensor([5.0, 2.0, 0.7, 0.1, 0.0], dtype=torch.float64)
    start = torch.linspace(-8, 8, 33, dtype=torch.float64)
    expected = start
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist()):
        epsilon = (expected - mixture(expected, sigma)) / sigma / 1.03
        expected = (expected - sigma * epsilon) + following * epsilon
    torch.testing.assert_close(epsilon_scaled(euler, 1.03)(mixture, start, sigmas), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("solver", [euler, heun, dpmpp_2m])
def test_epsilon_scaling_undoes_what_a_network_overstates(solver):
    """Scaled by 1.03, a denoiser that finds 3 % too much noise draws what the exact one does; by 1, nothing changes."""
    sigmas, start = EDM().sampling_sigmas(12), torch.linspace(-80, 80, 33, dtype=torch.float64)
    overstating = lambda x, sigma: x - 1.03 * (x - mixture(x, sigma))  # noqa: E731
    mended, exact = epsilon_scaled(solver, 1.03)(overstating, start, sigmas), solver(mixture, start, sigmas)
    torch.testing.assert_close(mended, exact, rtol=1e-9, atol=1e-9)
    worse = solver(overstating, start, sigmas)
    assert (worse - exact).abs().mean() > 0.01
    assert torch.equal(epsilon_scaled(solver, 1.0)(overstating, start, sigmas), worse)


def test_epsilon_scaling_leaves_infinite_noise_alone():
    """At infinite noise, x is the noise itself; at the next level, the noise found in x is divided as usual."""
    x0, noise, _ = drawn(2)
    seen = []
    watch = lambda step, x, denoised: seen.append((x, denoised))  # noqa: E731
    epsilon_scaled(euler, 1.25)(lambda x, s: x0, noise, torch.tensor([math.inf, 3.0, 1.0]), on_step=watch)
    torch.testing.assert_close(seen[0][0], x0 + 3 * noise)
    torch.testing.assert_close(seen[0][1], x0)
    torch.testing.assert_close(seen[1][1], x0 + 0.2 * 3 * noise)


@pytest.mark.parametrize("solver", [euler, heun, dpmpp_2m])
def test_an_image_is_clipped_after_its_noise_was_scaled(solver):
    """Clipped before scaling, samples keep noise of a cosine schedule's first levels, 20,000: a deviation of 0.8."""
    sigmas = DDPM(schedule="cosine").sampling_sigmas(25)
    start = torch.randn(4096, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * sigmas[0]
    gaussian = lambda x, s: 0.2 + (x - 0.2) * 0.0625 / (0.0625 + s**2)  # noqa: E731
    seen = []
    drawn = clipped(epsilon_scaled(solver, 1.005))(gaussian, start, sigmas, on_step=lambda *step: seen.append(step[2]))
    assert max(denoised.abs().max() for denoised in seen) <= 1
    assert abs(drawn.mean() - 0.2) < 0.02 and abs(drawn.std() - 0.25) < 0.025


def test_epsilon_scaling_refuses_what_it_cannot_divide_by():
    with pytest.raises(Refused, match="factor = 0: epsilon scaling divides by it"):
        epsilon_scaled(euler, 0)


# ------------------------------------------------------------------------------------- flow, and infinite noise

ZERO_SNR = [DDPM(prediction=p, schedule=s, rescale_zero_snr=True) for p in ("v", "x0") for s in ("linear", "cosine")]


@pytest.mark.parametrize("times", ["uniform", "logit_normal"])
def test_flow_loss_is_the_papers(times):
    """Liu et al. 2023, equation 1: |v - (noise - x0)|^2 at x_t = (1 - t) x0 + t noise."""
    objective = Flow(times=times)
    x0, noise, u = drawn()
    sigma = objective.draw_sigma(u)
    t = (sigma / (1 + sigma))[:, None, None, None]
    scaled, target = mixed(objective, x0, noise, sigma)
    torch.testing.assert_close(scaled, (1 - t) * x0 + t * noise, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(target, noise - x0, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(objective.scalings(sigma).noise_N, 1000 * t.flatten())
    output = 0.3 * scaled - 0.2
    paper = (output - (noise - x0)).square().mean()
    assert objective(output.float(), target.float(), sigma).item() == pytest.approx(paper.item(), rel=1e-6)
    if times == "uniform":
        torch.testing.assert_close(t.flatten(), u)


def test_flow_times_follow_the_logit_normal():
    u = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    sigma = Flow(logit_mean=0.4, logit_std=0.7).draw_sigma(u)
    logits = (sigma / (1 + sigma)).logit()
    assert logits.mean().item() == pytest.approx(0.4, abs=1e-3)
    assert logits.std().item() == pytest.approx(0.7, abs=1e-2)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 7, 28])
def test_flow_trajectories_equal_diffusers_from_pure_noise(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(1000, shift=shift)
    t = torch.linspace(1, 1 / steps, steps)
    scheduler.set_timesteps(sigmas=t.tolist())
    start = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    velocity = lambda x, t: torch.tanh(x) * (0.5 + t) + 0.1  # noqa: E731 - any function of x_t and t
    theirs, x = [], start
    for i, step in enumerate(scheduler.timesteps):
        x = scheduler.step(velocity(x, scheduler.sigmas[i].item()), step, x, return_dict=False)[0]
        theirs.append(x.double())
    objective, ours = Flow(shift=shift), []
    sigmas = objective.sampling_sigmas(steps)
    euler(network_denoiser(objective, velocity, 1000), start, sigmas, on_step=lambda i, x, d: ours.append(x))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a / (1 + sigmas[i + 1]) - b).abs().max() <= 1e-5, i


def test_flow_linspace_is_diffusers_default():
    scheduler = FlowMatchEulerDiscreteScheduler(1000)
    scheduler.set_timesteps(12)
    sigmas = Flow().sampling_sigmas(12, "linspace")[:-1]
    torch.testing.assert_close((1 / (1 + 1 / sigmas)).float(), scheduler.sigmas[:-1])


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("spacing", Flow.spacings)
def test_every_spacing_of_flow_falls_to_zero_and_is_shifted(spacing, shift):
    """Levels begin at t = 1 or 0.999 and, except for trailing, end at t = 0.001; a shift multiplies every level."""
    sigmas, plain = (Flow(shift=s).falling_sigmas(12, spacing) for s in (shift, 1.0))
    assert len(sigmas) == 13 and (sigmas.diff() < 0).all() and sigmas[-1] == 0
    torch.testing.assert_close(sigmas, shift * plain, rtol=1e-12, atol=0)
    first, last = (
        (999.0 if spacing in ("karras", "log-linear") else torch.inf),
        (1 / 11 if spacing == "trailing" else 1 / 999),
    )
    torch.testing.assert_close(plain[[0, -2]], torch.tensor([first, last], dtype=torch.float64), rtol=1e-9, atol=0)


def network_denoiser(objective, network, time_scale):
    """D from a function of (c_in x, c_noise / time_scale), with x the noise itself where sigma is infinite."""

    def denoise(x, sigma):
        c = objective.scalings(torch.tensor([sigma], dtype=torch.float64))
        return c.skip_N * x + c.out_N * network(c.in_N * x, (c.noise_N / time_scale).item())

    return denoise


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_zero_snr_trajectories_equal_diffusers(schedule, kind):
    """From infinite noise, through the network: Lin et al. 2024 with v prediction and trailing steps."""
    name, start, end = THEIRS[schedule]
    cls = DDIMScheduler if kind == "ddim" else DDPMScheduler
    scheduler = cls(
        1000,
        beta_schedule=name,
        beta_start=start,
        beta_end=end,
        clip_sample=False,
        timestep_spacing="trailing",
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
    )
    scheduler.set_timesteps(20)
    g = torch.Generator().manual_seed(0)
    noises = [torch.randn(2, 1, 4, 4, generator=g, dtype=torch.float64) for _ in range(21)]
    network = lambda z, t: 0.6 * torch.tanh(z) - 0.2 * t  # noqa: E731
    theirs, x = [], noises[0]
    for i, t in enumerate(scheduler.timesteps):
        output = network(x, t.item() / 1000)
        step = noised_step(scheduler, output, t, x, noises[i + 1]) if kind == "ddpm" else None
        x = scheduler.step(output, t, x).prev_sample if step is None else step
        theirs.append(x)
    objective = DDPM(schedule=schedule, prediction="v", rescale_zero_snr=True)
    sigmas, ours = objective.sampling_sigmas(20), []
    assert sigmas[0] == math.inf
    solver = euler if kind == "ddim" else ancestral
    denoise = network_denoiser(objective, network, 1000)
    solver(denoise, noises[0], sigmas, noise=lambda i: noises[i + 1], on_step=lambda i, x, d: ours.append(x))
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert (a / (1 + sigmas[i + 1] ** 2).sqrt() - b).abs().max() <= 1e-4, i


@pytest.mark.parametrize("objective", [Flow(), *ZERO_SNR], ids=str)
def test_at_infinite_noise_coefficients_and_denoiser_hold(objective):
    """The input is the noise alone, and a perfect output still denoises to the image."""
    x0, noise, _ = drawn(2)
    sigma = torch.tensor([math.inf, math.inf], dtype=torch.float64)
    scaled, target = mixed(objective, x0, noise, sigma)
    torch.testing.assert_close(scaled, noise)
    c = [v[:, None, None, None] for v in objective.scalings(sigma)]
    torch.testing.assert_close(c[2] * noise, noise)
    torch.testing.assert_close(c[0] * noise + c[1] * target, x0)
    assert objective.loss_weight(sigma).isfinite().all()
    near = torch.tensor([1e6, 1e7], dtype=torch.float64)
    torch.testing.assert_close(objective.coefficients(near), objective.coefficients(sigma), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", [euler, heun, dpmpp_2m, ancestral, stochastic_heun])
@pytest.mark.parametrize("objective", [Flow(), ZERO_SNR[0]], ids=["flow", "zero_snr"])
def test_every_sampler_begins_at_infinite_noise(objective, solver):
    """With one known image, the exact denoiser returns it, whatever the noise."""
    x0, noise, _ = drawn(2)
    sigmas = objective.sampling_sigmas(6)
    assert sigmas[0] == math.inf
    out = solver(lambda x, sigma: x0, noise, sigmas, noise=lambda i: noise)
    torch.testing.assert_close(out, x0)


def test_zero_snr_with_epsilon_is_refused():
    with pytest.raises(Refused, match="rescale_zero_snr with prediction epsilon"):
        DDPM(rescale_zero_snr=True).check()


def test_zero_snr_trains_and_indexes_every_step():
    objective = ZERO_SNR[0]
    sigma = objective.draw_sigma((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    assert sigma[-1] == math.inf
    torch.testing.assert_close(objective.scalings(sigma).noise_N, torch.arange(1000, dtype=torch.float64))
