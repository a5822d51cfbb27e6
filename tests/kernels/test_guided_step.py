"""guided_step against its definition in fp64, and against the arithmetic of two network outputs written out."""

import pytest
import torch

from duotone.kernels import dispatch
from duotone.kernels.guided_step import CASES, NAME, guided_step, guided_step_reference

CHECKED = [case for case in CASES if not case.timed]
BY_NAME = {case.name: case for case in CASES}


def draw(shape, device, dtype, layout=torch.channels_last):
    images = shape[0]
    prediction = torch.randn(2 * images, *shape[1:], device=device).to(dtype).contiguous(memory_format=layout)
    x_NCHW = torch.randn(shape, device=device).contiguous(memory_format=layout)
    per_image = {name: torch.rand(images, device=device) + 0.5 for name in ("c_skip_N", "c_out_N")}
    scale_N = torch.arange(images, device=device) * 2.0 + 1.0
    return {"prediction_2NCHW": prediction, "x_NCHW": x_NCHW, **per_image, "scale_N": scale_N}


def wide(given):
    return {name: value.double() for name, value in given.items()}


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_agrees_with_fp64(case, dtype, layout, device, agree, launching):
    given = draw(case.shape, device, dtype, layout)
    with launching(NAME, launches=2 if case.rescale else 1):
        guided_NCHW = guided_step(**given, rescale=case.rescale)
    exact = guided_step_reference(**wide(given), rescale=case.rescale)
    agree(guided_NCHW, exact, "guided", 1e-6)
    assert guided_NCHW.dtype == torch.float32 and guided_NCHW.stride() == given["x_NCHW"].stride()


def test_images_in_bf16(device, agree, launching):
    given = draw((2, 3, 8, 8), device, torch.bfloat16)
    given["x_NCHW"] = given["x_NCHW"].bfloat16()
    with launching(NAME):
        guided_NCHW = guided_step(**given)
    agree(guided_NCHW, guided_step_reference(**wide(given)), "guided", 1e-6)


def test_scale_one_is_the_conditional_prediction(device, launching):
    given = draw((2, 3, 8, 8), device, torch.float32)
    given["scale_N"] = torch.ones(2, device=device)
    with launching(NAME):
        guided_NCHW = guided_step(**given)
    skip, out = (given[name][:, None, None, None] for name in ("c_skip_N", "c_out_N"))
    denoised_NCHW = skip * given["x_NCHW"] + out * given["prediction_2NCHW"][:2]
    torch.testing.assert_close(guided_NCHW, denoised_NCHW, rtol=1e-6, atol=1e-6)


def test_full_rescale_restores_each_images_deviation(device, launching):
    given = draw((3, 3, 16, 16), device, torch.float32)
    with launching(NAME):
        guided_NCHW = guided_step(**given, rescale=1.0)
    given["scale_N"] = torch.ones(3, device=device)
    denoised_NCHW = guided_step(**given)
    torch.testing.assert_close(guided_NCHW.std(dim=(1, 2, 3)), denoised_NCHW.std(dim=(1, 2, 3)))


def test_a_flat_image_has_nothing_to_rescale(device, launching):
    """An untrained network predicts zeros: rescaling by their deviation would make every image NaN."""
    given = draw((2, 3, 16, 16), device, torch.float32)
    given["x_NCHW"][0], given["prediction_2NCHW"][[0, 2]] = 0.0, 0.0
    with launching(NAME, launches=2):
        guided_NCHW = guided_step(**given, rescale=0.7)
    assert guided_NCHW.isfinite().all() and not guided_NCHW[0].any()
    torch.testing.assert_close(guided_NCHW, guided_step_reference(**given, rescale=0.7), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", [8, 16, 64, 96])
def test_a_flat_image_of_any_colour_stays_as_it_is(side, device, launching):
    """The mean of a constant is rounded; what is left after subtracting it must not count as a deviation to rescale."""
    for colour, scale, rescale in ((0.1, 3.3, 0.7), (-0.3, 3.3, 0.7), (0.30859375, 3.3, 0.7), (0.1, 0.0, 1.0)):
        given = draw((2, 3, side, side), device, torch.float32)
        ones_N = torch.ones(2, device=device)
        given |= {"c_skip_N": 0 * ones_N, "c_out_N": ones_N, "scale_N": scale * ones_N}
        given["prediction_2NCHW"][2] = colour
        if scale:  # at scale 0 the conditional half does not show
            given["prediction_2NCHW"][0] = colour / 2
        with launching(NAME, launches=2):
            guided_NCHW = guided_step(**given, rescale=rescale)
        exact = {name: value.double() for name, value in given.items()}
        for found in (guided_NCHW, guided_step_reference(**given, rescale=rescale)):
            torch.testing.assert_close(
                found.double(), guided_step_reference(**exact, rescale=rescale), rtol=1e-5, atol=1e-5
            )


@pytest.mark.parametrize("obstacle", ["layout", "gradient", "type"])
def test_what_no_kernel_covers_goes_to_the_reference_and_is_counted(obstacle, device):
    given = draw((2, 3, 9, 8), device, torch.float32)
    if obstacle == "layout":
        given["x_NCHW"] = given["x_NCHW"].contiguous()
    if obstacle == "gradient":
        given["x_NCHW"].requires_grad_()
    if obstacle == "type":
        given["c_skip_N"] = given["c_skip_N"].double()
    launches, rows = dispatch.launches[NAME], len(dispatch.fallbacks())
    guided_NCHW = guided_step(**given)
    assert dispatch.launches[NAME] == launches and len(dispatch.fallbacks()) == rows + 1
    torch.testing.assert_close(guided_NCHW.double(), guided_step_reference(**wide(given)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"prediction_2NCHW": torch.ones(3, 3, 8, 8)}, "prediction_2NCHW"),
        ({"prediction_2NCHW": torch.ones(4, 3, 8, 8, dtype=torch.int32)}, "prediction_2NCHW"),
        ({"x_NCHW": torch.ones(2, 3, 8)}, "x_NCHW"),
        ({"c_skip_N": torch.ones(3)}, "c_skip_N"),
        ({"c_out_N": torch.ones(())}, "c_out_N"),
        ({"scale_N": torch.ones(2, 1)}, "scale_N"),
        ({"rescale": 1.5}, "rescale"),
    ],
)
def test_refuses_what_cannot_fit(change, argument, device):
    given = draw((2, 3, 8, 8), device, torch.float32) | change
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        guided_step(**given)
