"""adamw_ema_ against its definition in fp64, and over many steps against torch.optim.AdamW."""

import pytest
import torch

from duotone.kernels import dispatch
from duotone.kernels.adamw_ema import CASES, NAME, adamw_ema_, adamw_ema_reference_

CHECKED = [case for case in CASES if not case.timed]
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "step": 7, "grad_scale": 0.25}
DECAYS = (0.999, 0.5)


def draw(case, device):
    """State in the middle of a run."""
    count = case.parameters
    state = [torch.randn(count, device=device), torch.randn(count, device=device).to(case.grad)]
    state += [0.1 * torch.randn(count, device=device), 0.01 * torch.rand(count, device=device)]
    emas = [torch.randn(count, device=device) for _ in range(case.tracks)]
    weights = None if case.weights is None else torch.empty(count, dtype=case.weights, device=device)
    return state, emas, weights


def on_device(options, device):
    return {
        name: torch.tensor(float(value), device=device) if name in ("lr", "step", "grad_scale") else value
        for name, value in options.items()
    }


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "device_tensors"])
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, tensors, device, agree, launching):
    state, emas, weights = draw(case, device)
    exact_state, exact_emas = [t.double() for t in state], [t.double() for t in emas]
    decays = DECAYS[: case.tracks]
    adamw_ema_reference_(*exact_state, exact_emas, **OPTIONS, ema_decays=decays)
    options = on_device(OPTIONS, device) if tensors else OPTIONS
    given_decays = [torch.tensor(decay, device=device) for decay in decays] if tensors else decays
    with launching(NAME, launches=1):
        adamw_ema_(*state, emas, **options, ema_decays=given_decays, weights_out=weights)
    # A parameter may come out near 0: judge its error relative to what it was computed from.
    drawn = {"exp_avg": 0.1, "exp_avg_sq": 0.01}
    for name, mine, exact in zip(("master", "grad", "exp_avg", "exp_avg_sq"), state, exact_state):
        agree(mine, exact, name, 5e-7, scale=exact.abs().amax().clamp(min=drawn.get(name, 1.0)))
    for mine, exact in zip(emas, exact_emas):
        agree(mine, exact, "ema", 5e-7, scale=exact.abs().amax().clamp(min=1.0))
    if weights is not None:
        agree(weights, state[0].double(), "weights", 0.0)


@pytest.mark.parametrize("step", [1, 2, 10, 1000, 100_000])
def test_bias_correction_at_every_age(step, device, agree, launching):
    """In fp32, 1 - beta ** step loses digits for the first thousand steps unless it is computed with care."""
    (master, grad, average, square), _, _ = draw(CASES[1], device)
    exact = [t.double() for t in (master, grad, average, square)]
    options = OPTIONS | {"step": step, "weight_decay": 0.0, "lr": 1.0}
    before = master.clone()
    adamw_ema_reference_(*exact, **options)
    with launching(NAME):
        adamw_ema_(master, grad, average, square, **on_device(options, device))
    agree(master - before, exact[0] - before.double(), "update", 3e-6)


@pytest.mark.parametrize(
    "betas,average,square,gradient",
    [
        ((0.9, 0.0), 0.5, 1.0, 1e-4),
        ((0.0, 0.0), 1e3, 1e6, 1e-3),
        ((0.0, 0.999), 1e4, 1e-4, 1e-3),
        ((0.9, 0.999), 0, 0, 2e20),
    ],
    ids=str,
)
def test_neither_a_small_beta_nor_a_large_gradient_loses_the_other(betas, average, square, gradient, device, launching):
    """At a share of 1, share * (new - old) would round a small new value away; a large one's square would overflow."""
    flat = [torch.full((1024,), float(value), device=device) for value in (0.0, gradient, average, square)]
    exact = [t.double() for t in flat]
    options = OPTIONS | {"step": 1000, "weight_decay": 0.0, "betas": betas}
    adamw_ema_reference_(*exact, **options)
    with launching(NAME):
        adamw_ema_(*flat, **on_device(options, device))
    for found, expected in zip(flat, exact):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=0)


def test_eps_is_added_behind_the_bias_correction(device, agree, launching):
    """Early in a run, with gradients about as small as eps, the place where eps is added decides the update."""
    (master, grad, *_), _, _ = draw(CASES[1], device)
    grad, average, square = grad * 1e-6, torch.zeros_like(grad), torch.zeros_like(grad)
    exact = [t.double() for t in (master, grad, average, square)]
    options = OPTIONS | {"step": 2, "weight_decay": 0.0, "lr": 1.0, "eps": 1e-6, "grad_scale": 1.0}
    before = master.clone()
    adamw_ema_reference_(*exact, **options)
    with launching(NAME):
        adamw_ema_(master, grad, average, square, **options)
    agree(master - before, exact[0] - before.double(), "update", 3e-6)


def test_follows_torch_over_many_steps(device, launching):
    start = torch.randn(513, device=device)
    theirs = torch.nn.Parameter(start.clone())
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizer = torch.optim.AdamW([theirs], **options)
    master, average, square, ema = start.clone(), *(torch.zeros_like(start) for _ in range(2)), start.clone()
    their_ema = start.clone()
    for step in range(1, 31):
        gradient = torch.randn_like(start)
        theirs.grad = gradient.clone()
        optimizer.step()
        their_ema.lerp_(theirs.detach(), 0.1)
        with launching(NAME):
            adamw_ema_(master, gradient, average, square, [ema], **options, step=step, ema_decays=[0.9])
    torch.testing.assert_close(master, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ema, their_ema, rtol=1e-5, atol=1e-6)


def test_what_no_kernel_covers_goes_to_the_reference_and_is_counted(device):
    master, average, square = (torch.zeros(77, device=device) for _ in range(3))
    gradient = torch.ones(77, dtype=torch.float64, device=device)
    launches = dispatch.launches[NAME]
    adamw_ema_(master, gradient, average, square, **OPTIONS)
    assert dispatch.launches[NAME] == launches and master.abs().min() > 0
    assert {"kernel": NAME, "reason": "torch.float64 gradients", "shape": [77]} in dispatch.fallbacks()


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"master_P": torch.ones(2, 4)}, "master_P"),
        ({"master_P": torch.ones(8, dtype=torch.bfloat16)}, "master_P"),
        ({"grad_P": torch.ones(7)}, "grad_P"),
        ({"exp_avg_P": torch.ones(8, dtype=torch.float16)}, "exp_avg_P"),
        ({"exp_avg_sq_P": torch.ones(16)[::2]}, "exp_avg_sq_P"),
        ({"emas": [torch.ones(8)] * 3, "ema_decays": [0.9] * 3}, "emas"),
        ({"emas": [torch.ones(8)]}, "ema_decays"),
        ({"emas": [torch.ones(9)], "ema_decays": [0.9]}, "emas\\[0\\]"),
        ({"weights_out": torch.ones(9)}, "weights_out"),
        ({"weights_out": torch.ones(8, dtype=torch.int32)}, "weights_out"),
        ({"grad_P": torch.ones(8, dtype=torch.int64)}, "grad_P"),
        ({"grad_P": torch.ones(8, device="meta")}, "grad_P"),
        ({"step": 0}, "step"),
        ({"lr": torch.ones(1)}, "lr"),
        ({"step": torch.ones((), device="meta")}, "step"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_refuses_what_cannot_fit(change, argument, device):
    flat = {name: torch.ones(8) for name in ("master_P", "grad_P", "exp_avg_P", "exp_avg_sq_P")}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        adamw_ema_(**(flat | OPTIONS | change))


@pytest.mark.parametrize("tensors", [False, True], ids=["numbers", "device_tensors"])
def test_a_step_marked_by_nan_leaves_everything_as_it_was(tensors, device, launching):
    state, emas, weights = draw(CASES[0], device)
    weights.fill_(3.0)
    held = [*state, *emas, weights]
    before = [value.clone() for value in held]
    options = OPTIONS | {"grad_scale": float("nan")}
    with launching(NAME, launches=1):
        adamw_ema_(
            *state,
            emas,
            **(on_device(options, device) if tensors else options),
            ema_decays=DECAYS,
            weights_out=weights,
        )
    assert all(value.equal(was) for value, was in zip(held, before))
    adamw_ema_reference_(*state, emas, **options, ema_decays=DECAYS, weights_out=weights)
    assert all(value.equal(was) for value, was in zip(held, before))
