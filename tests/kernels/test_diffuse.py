"""diffuse: the kernel's input and target are the reference's, bit for bit."""

import pytest
import torch

from duotone.kernels import dispatch
from duotone.kernels.diffuse import CASES, NAME, diffuse, diffuse_reference

CHECKED = [case for case in CASES if not case.timed]


def draw(shape, device):
    images = shape[0]
    return {
        "images_NHWC": torch.randint(0, 256, shape, dtype=torch.uint8).to(device),
        "flip_N": (torch.arange(images) % 2 == 0).to(device),
        "coefficients_N4": torch.randn(images, 4).to(device),
        "seed": 2**45 + 7,
        "positions_N": (torch.arange(images) * 2**31 + 5).to(device),
        "purpose": 3,
    }


def on_cpu(given):
    return {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_the_same_bits_on_every_device(case, dtype, device, launching):
    given = draw(case.shape, device)
    with launching(NAME, launches=1):
        input_NCHW, target_NCHW = diffuse(**given, dtype=dtype)
    expected = diffuse_reference(**on_cpu(given), dtype=dtype)
    assert target_NCHW.cpu().equal(expected[1])
    there = diffuse_reference(**given, dtype=dtype)
    assert all(mine.cpu().equal(truth) for mine, truth in zip(there, expected)), "the definition, on the device"
    if dtype == torch.bfloat16 and dispatch.INTERPRETED:  # which truncates where devices round
        torch.testing.assert_close(input_NCHW, expected[0], rtol=2.0**-7, atol=1e-6)
    else:
        assert input_NCHW.cpu().equal(expected[0])
    assert input_NCHW.dtype == dtype and target_NCHW.dtype == torch.float32
    assert input_NCHW.permute(0, 2, 3, 1).is_contiguous() and target_NCHW.permute(0, 2, 3, 1).is_contiguous()


def test_images_of_any_stride(device, launching):
    given = draw((2, 12, 10, 3), device)
    packed = diffuse(**given)
    wide = torch.zeros(2, 3, 14, 15, dtype=torch.uint8, device=device)
    wide[:, :, 1:13, 2:12] = given["images_NHWC"].permute(0, 3, 1, 2)
    given["images_NHWC"] = wide[:, :, 1:13, 2:12].permute(0, 2, 3, 1)
    with launching(NAME):
        strided = diffuse(**given)
    assert packed[0].equal(strided[0]) and packed[1].equal(strided[1])


def test_images_whose_pixels_lie_too_far_apart_go_to_the_reference(device):
    given = draw((1, 3, 2, 3), device)
    packed, before = diffuse(**given), len(dispatch.fallbacks())
    far_NHWC = torch.empty_strided((1, 3, 2, 3), (1, 2**30, 8, 1), dtype=torch.uint8, device=device)  # never touched
    given["images_NHWC"] = far_NHWC.copy_(given["images_NHWC"])
    found = diffuse(**given)
    assert packed[0].equal(found[0]) and packed[1].equal(found[1])
    assert "farther apart" in dispatch.fallbacks()[-1]["reason"] and len(dispatch.fallbacks()) == before + 1


def test_coefficients_get_their_gradient_and_an_empty_batch_is_one(device):
    given = draw((2, 4, 4, 3), device)
    given["coefficients_N4"].requires_grad_()
    input_NCHW, target_NCHW = diffuse(**given)
    (input_NCHW.sum() + target_NCHW.sum()).backward()
    assert given["coefficients_N4"].grad.abs().min() > 0
    empty = {name: value[:0] if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    assert diffuse(**empty)[0].shape == (0, 3, 4, 4)


def test_per_image_values_of_any_stride(device, launching):
    given = draw((2, 6, 8, 3), device)
    given |= {"flip_N": given["flip_N"][:1].expand(2), "positions_N": torch.arange(4, device=device)[::3]}
    with launching(NAME):
        noisy_NCHW, target_NCHW = diffuse(**given)
    assert target_NCHW.cpu().equal(diffuse_reference(**on_cpu(given))[1])


def test_the_image_flips_and_the_noise_does_not(device, launching):
    given = draw((2, 6, 8, 3), device)
    given["coefficients_N4"] = torch.tensor([[1.0, 0, 0, 1]] * 2, device=device)
    given["positions_N"] = torch.tensor([5, 5], device=device)
    with launching(NAME):
        image_NCHW, noise_NCHW = diffuse(**given)
    assert noise_NCHW[0].equal(noise_NCHW[1])
    shown = (given["images_NHWC"].cpu().permute(0, 3, 1, 2).float() / 127.5 - 1).to(device)
    assert image_NCHW[0].equal(shown[0].flip(2)) and image_NCHW[1].equal(shown[1])
    assert image_NCHW.min() >= -1 and image_NCHW.max() <= 1


@pytest.mark.parametrize(
    "change,argument",
    [
        ({"images_NHWC": torch.zeros(2, 4, 4, 3)}, "images_NHWC"),
        ({"flip_N": torch.zeros(2)}, "flip_N"),
        ({"flip_N": torch.zeros(3, dtype=torch.bool)}, "flip_N"),
        ({"coefficients_N4": torch.zeros(2, 3)}, "coefficients_N4"),
        ({"coefficients_N4": torch.zeros(2, 4, dtype=torch.float64)}, "coefficients_N4"),
        ({"positions_N": torch.zeros(2)}, "positions_N"),
        ({"dtype": torch.int32}, "dtype"),
    ],
)
def test_refuses_what_cannot_fit(change, argument, device):
    given = draw((2, 4, 4, 3), device) | change
    given = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
    with pytest.raises(ValueError, match=f"^{argument} must be"):
        diffuse(**given)
