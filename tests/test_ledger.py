"""The ledger's gates pass on this commit, and each of them can fail."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_every_gate_holds():
    """No spills on sm_90, bytes at the floor of the path taken, no more launches than in the committed ledger."""
    command = [sys.executable, "bench/ledger.py", "--check", "--kernels-alone"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout.splitlines()[-5:] + done.stderr.splitlines()[-5:]
    assert "every gate passes" in done.stdout.splitlines()[-1]


SOUND = {"kernel": "diffuse", "case": "c", "launches": 1, "bytes": 100, "path_floor": 100, "programs": {}}
PROGRAM = {"spilled_bytes": 0, "occupancy": 0.5, "fused_multiply_adds": 0}


@pytest.mark.parametrize(
    "fault,said",
    [
        ({"bytes": 110}, "moves 110 bytes, floor of its path is 100"),
        ({"launches": 2}, "2 launches, the committed ledger has fewer"),
        ({"programs": {"kernel sm_90": PROGRAM | {"spilled_bytes": 8}}}, "spills 8 bytes"),
        ({"programs": {"kernel sm_90": PROGRAM | {"occupancy": 0}}}, "occupancy 0"),
        ({"programs": {"kernel sm_90": PROGRAM | {"fused_multiply_adds": 3}}}, "3 fused multiply-adds"),
    ],
)
def test_a_fault_is_named(fault, said, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "bench")
    ledger = importlib.import_module("ledger")
    assert ledger.violations([SOUND], [SOUND]) == []
    (line,) = ledger.violations([SOUND | fault], [SOUND])
    assert said in line
