"""What torch.compile would launch on a GPU: our blocks are our kernels and library calls, and no pass in between."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(
    not torch.__version__.startswith("2.13."), reason="bench/gpu_code.py reads the compiler of torch 2.13"
)


def read(case, folder) -> dict[str, dict]:
    path = folder / f"{case}.json"
    command = [sys.executable, "bench/gpu_code.py", "--case", case, "--images", "2", "--json", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return {row["who"]: row for row in json.loads(path.read_text())["results"]}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return read("residual_32", tmp_path_factory.mktemp("gpu_code"))


@pytest.fixture(scope="module")
def up(tmp_path_factory):
    """A block that takes a skip; the border between x and the skip runs through a group."""
    return read("up_32", tmp_path_factory.mktemp("gpu_code"))


def whole_maps(row, which) -> list[str]:
    """Names of the launches that move at least 1 MiB: one map of 2 images, 256 channels and 32 x 32 pixels."""
    return [f"{launch['kind']} {launch['name']}" for launch in row["launches"][which] if launch["bytes"] >= 2**20]


def test_a_residual_block_is_norms_convolutions_and_a_sum(rows):
    assert whole_maps(rows["ours"], "forward") == [
        *("ours forward_statistics", "ours forward_apply", "library convolution"),
        *("ours forward_statistics", "ours forward_apply", "library convolution"),
        "fused add + convolution + permute",
    ]
    backward = whole_maps(rows["ours"], "backward")
    assert sorted(name.split()[0] for name in backward) == ["fused"] + 2 * ["library"] + 4 * ["ours"]


def test_norms_in_turns_are_one_launch_a_pass(rows):
    for which, ours in (("forward", "ours forward_in_turn"), ("backward", "ours backward_in_turn")):
        assert whole_maps(rows["ours, norms in turns"], which).count(ours) == 2


def test_nothing_is_filled_and_less_is_moved_than_by_a_compiled_diffusers_block(rows):
    assert all(row["fills_mebibytes"] == 0 for row in rows.values())
    for which in ("forward", "backward"):
        moved = [rows[who][f"{which}_mebibytes"] for who in ("diffusers", "ours", "ours, norms in turns")]
        assert moved == sorted(moved, reverse=True) and len(set(moved)) == 3


@pytest.mark.long
def test_a_skip_joined_within_the_block_is_copied_once_and_its_gradient_never(up):
    outside, inside = up["ours, joined outside"], up["ours"]
    assert [launch["name"] for launch in inside["launches"]["forward"] if "cat" in launch["name"]] == ["cat"]
    x_mebibytes = 2 * 384 * 32 * 32 * 2 / 2**20
    saved = outside["backward_mebibytes"] - inside["backward_mebibytes"]
    assert abs(saved - 2 * x_mebibytes) < 0.02


@pytest.mark.long
@pytest.mark.parametrize("turns", ["", " in turns"])
def test_norms_that_join_skips_leave_no_pass_for_it(up, turns):
    joins, without = (up[f"ours, norms{turns}{also}"] if turns or also else up["ours"] for also in (" join skips", ""))
    forward, backward = (whole_maps(joins, which) for which in ("forward", "backward"))
    assert not any("cat" in name for name in forward) and not any(name.startswith("fused") for name in backward)
    joined_mebibytes = 2 * 640 * 32 * 32 * 2 / 2**20
    assert abs(without["forward_mebibytes"] - joins["forward_mebibytes"] - joined_mebibytes) < 0.02
    assert abs(without["backward_mebibytes"] - joins["backward_mebibytes"] - 2 * joined_mebibytes) < 0.02
