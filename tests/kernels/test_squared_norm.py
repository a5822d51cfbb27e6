"""squared_norm against fp64, the same bits on every call, and values that are not finite."""

import pytest
import torch

from duotone.kernels import dispatch
from duotone.kernels.squared_norm import CASES, NAME, squared_norm, squared_norm_reference

CHECKED = [case for case in CASES if not case.timed]


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, device, launching):
    grad_P = torch.randn(case.parameters, device=device).to(case.grad)
    with launching(NAME, launches=1):
        found = squared_norm(grad_P)
    exact = grad_P.double().square().sum()
    torch.testing.assert_close(found, exact, rtol=3e-7, atol=0)
    torch.testing.assert_close(squared_norm_reference(grad_P), exact, rtol=1e-12, atol=0)


def test_gives_the_same_bits_again(device, launching):
    grad_P = torch.randn(50_000, device=device)
    with launching(NAME):
        assert all(squared_norm(grad_P).equal(squared_norm(grad_P)) for _ in range(3))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("at", [0, 8191, 9999])
def test_one_bad_gradient_shows(value, at, device, launching):
    grad_P = torch.randn(10_000, device=device)
    grad_P[at] = value
    with launching(NAME):
        assert not squared_norm(grad_P).isfinite()


def test_what_no_kernel_covers_goes_to_the_reference_and_is_counted(device):
    grad_P, launches = torch.ones(78, dtype=torch.float64, device=device), dispatch.launches[NAME]
    assert squared_norm(grad_P).item() == pytest.approx(78) and dispatch.launches[NAME] == launches
    assert {"kernel": NAME, "reason": "torch.float64 gradients", "shape": [78]} in dispatch.fallbacks()


@pytest.mark.parametrize("given", [torch.ones(2, 2), torch.ones(8)[::2], torch.ones(4, dtype=torch.int64)])
def test_refuses_what_cannot_fit(given, device):
    with pytest.raises(ValueError, match="^grad_P must be"):
        squared_norm(given)
