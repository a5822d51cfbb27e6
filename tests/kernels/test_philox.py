"""Philox against published answers, Triton's own generator and the distributions it must draw."""

import pytest
import torch

from duotone.kernels.dispatch import tl, triton
from duotone.kernels.philox import normal_reference, philox_reference, uniform_reference, words, words_reference

# Random123's known answers for philox4x32-10: counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, 2**64 - 1, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter,key,answer", KNOWN)
def test_known_answers(counter, key, answer):
    assert tuple(int(word) for word in philox_reference(key, *counter)) == answer


def test_signed_seed_is_the_unsigned_one_with_the_same_bits():
    assert words_reference(-5, [3], 1, 2).equal(words_reference(2**64 - 5, [3], 1, 2))


@triton.jit(do_not_specialize=["seed", "purpose"])
def _words_kernel(out, positions, seed, purpose, BLOCK: tl.constexpr):
    block = tl.arange(0, BLOCK)
    four = words(seed, block, tl.load(positions + tl.program_id(0)), purpose)
    row = out + tl.program_id(0) * BLOCK * 4 + block * 4
    for i in tl.static_range(4):
        tl.store(row + i, four[i].to(tl.int64))


@pytest.mark.parametrize("seed", [0, 1, 16, 2**31, 2**62 + 12345, -1])
def test_equals_tritons_generator_bit_for_bit(seed, device):
    positions_N = torch.tensor([0, 1, 2**32 - 1, 2**32, 2**40 + 17], device=device)
    out_NB4 = torch.zeros(5, 64, 4, dtype=torch.int64, device=device)
    _words_kernel[(5,)](out_NB4, positions_N, seed, 7, BLOCK=64)
    assert out_NB4.equal(words_reference(seed, positions_N, 7, 64))


def test_normals_are_normal():
    draws = normal_reference(11, torch.arange(64), 3, 4099).double()
    assert draws.shape == (64, 4099)
    count = draws.numel()
    assert abs(draws.mean()) < 5 / count**0.5
    assert abs(draws.var() - 1) < 5 * (2 / count) ** 0.5
    assert abs((draws**4).mean() - 3) < 5 * (96 / count) ** 0.5
    ordered = draws.flatten().sort().values
    expected = torch.special.ndtr(ordered)
    assert (expected - (torch.arange(count) + 0.5) / count).abs().max() < 2 / count**0.5


def test_normals_are_box_and_muller_to_fp32():
    words_NB4 = words_reference(5, torch.arange(50), 2, 200)
    u = ((words_NB4.float() + 0.5) / 2**32).double()
    radius, angle = (-2 * u[..., 0::2].log()).sqrt(), 2 * torch.pi * (words_NB4[..., 1::2].double() + 0.5) / 2**32
    exact = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    torch.testing.assert_close(normal_reference(5, torch.arange(50), 2, 800).double(), exact, rtol=0, atol=1.5e-6)


def test_extreme_words_give_finite_normals(monkeypatch):
    edges = torch.tensor([0, 1, 2**29 - 1, 2**29, 2**30, 2**31, 2**32 - 2, 2**32 - 1])
    grid = torch.cartesian_prod(edges, edges)
    extreme_1B4 = torch.cat((grid, grid.flip(1)), dim=1)[None]
    monkeypatch.setattr("duotone.kernels.philox.words_reference", lambda *_: extreme_1B4)
    draws = normal_reference(0, [0], 0, extreme_1B4.numel())
    assert draws.isfinite().all() and draws.abs().max() < 7


def test_uniforms_are_open_and_even():
    draws = uniform_reference(3, torch.arange(1000), 9, 5)
    assert draws.dtype == torch.float64 and draws.shape == (1000, 5)
    assert draws.min() > 0 and draws.max() < 1
    assert abs(draws.mean() - 0.5) < 5 * (1 / 12 / 5000) ** 0.5


def test_a_draw_depends_on_its_own_position_alone():
    together = normal_reference(1, torch.tensor([4, 9, 2**33]), 2, 10)
    alone = normal_reference(1, torch.tensor([2**33]), 2, 6)
    assert together[2, :6].equal(alone[0])
    assert not together[0].equal(normal_reference(1, torch.tensor([4]), 3, 10)[0])
    assert not together[0].equal(normal_reference(2, torch.tensor([4]), 2, 10)[0])
