"""The start-up check passes on sound kernels and switches off an unsound one."""

import importlib
from pathlib import Path

import pytest
import torch

from duotone.kernels import adamw_ema, dispatch, group_norm_silu
from duotone.kernels.self_test import _CHECKS, self_test

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def nothing_stays_disabled(monkeypatch):
    monkeypatch.setattr(dispatch, "_disabled", {})
    monkeypatch.setattr(dispatch, "_fallbacks", {})


def test_every_kernel_is_checked_tested_and_measured(monkeypatch):
    """A new kernel file is not found by itself: the start-up check, a test and the benches' subjects must name it."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    subjects = importlib.import_module("subjects").SUBJECTS
    modules = [
        importlib.import_module(f"duotone.kernels.{path.stem}") for path in sorted((ROOT / "kernels").glob("*.py"))
    ]
    kernels = [module for module in modules if hasattr(module, "CASES")]
    assert len(kernels) >= 6 and {module.NAME for module in kernels} == set(_CHECKS)
    assert {module.NAME for module in kernels} <= set(subjects)
    assert all((ROOT / "tests" / "kernels" / f"test_{module.NAME}.py").exists() for module in kernels)


def test_sound_kernels_pass_and_the_random_state_is_untouched(device):
    state = torch.get_rng_state()
    launches = sum(dispatch.launches.values())
    assert self_test(device) == []
    assert torch.get_rng_state().equal(state)
    assert sum(dispatch.launches.values()) > launches + 10


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_may_be_loaded_where_no_gradient_is_kept(device, mode):
    with mode():
        assert self_test(device) == []


@pytest.fixture(scope="module")
def norms_of_the_plain_check():
    """Launches of the norms' kernels in a self-test without the further cases."""
    before = dispatch.launches[group_norm_silu.NAME]
    assert self_test("cpu" if dispatch.INTERPRETED else "cuda") == []
    return dispatch.launches[group_norm_silu.NAME] - before


def test_norms_in_turns_are_tried_where_a_run_has_them(device, norms_of_the_plain_check):
    before = dispatch.launches[group_norm_silu.NAME]
    assert self_test(device, in_turns=True) == []
    assert dispatch.launches[group_norm_silu.NAME] - before == norms_of_the_plain_check + 2, "one launch a pass"


def test_norms_that_join_skips_are_tried_where_a_run_has_them(device, norms_of_the_plain_check, monkeypatch):
    before = dispatch.launches[group_norm_silu.NAME]
    assert self_test(device, joins_skips=True) == []
    assert dispatch.launches[group_norm_silu.NAME] - before == 2 * norms_of_the_plain_check

    def wrong(x_NCHW, skip_NCHW, *arguments, **options):
        y_NCHW, joined_NCHW = right(x_NCHW, skip_NCHW, *arguments, **options)
        return y_NCHW, joined_NCHW + 0 * skip_NCHW.sum() + 0.1 * x_NCHW.sum()

    right = group_norm_silu.joined_group_norm_silu
    monkeypatch.setattr(group_norm_silu, "joined_group_norm_silu", wrong)
    assert len(self_test(device, joins_skips=True)) == 1


def test_a_wrong_gradient_switches_its_kernel_off(device, monkeypatch):
    def wrong(*arguments):
        dx_NCHW, dweight_bias, *small = right(*arguments)
        return dx_NCHW, dweight_bias.flip(0), *small

    right = group_norm_silu._backward
    monkeypatch.setattr(group_norm_silu, "_backward", wrong)
    (line,) = self_test(device)
    assert line.startswith("group_norm_silu: the gradient of weight_C differs from its definition by")
    assert list(dispatch.disabled()) == ["group_norm_silu"]
    assert dispatch.fallbacks()[0]["kernel"] == "group_norm_silu"
    before = dispatch.launches["group_norm_silu"]
    weight_C = torch.ones(8, device=device)
    group_norm_silu.group_norm_silu(torch.ones(1, 8, 4, 4, device=device), weight_C, weight_C, 2)
    assert dispatch.launches["group_norm_silu"] == before


def test_a_kernel_that_does_not_compile_is_switched_off(device, monkeypatch):
    def broken(*_):
        raise RuntimeError("ptxas: no such chip\nand more")

    monkeypatch.setattr(adamw_ema, "_launch", broken)
    assert self_test(device) == ["adamw_ema: RuntimeError: ptxas: no such chip; its reference runs instead"]


def test_nothing_is_tested_where_nothing_runs():
    assert self_test("meta") == []
