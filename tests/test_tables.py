"""How tables are made from results: they name what did not run instead of leaving it out."""

import importlib
from pathlib import Path

import pytest

from duotone.data.whole_file import write_json

BENCH = Path(__file__).parent.parent / "bench"


def took(**milliseconds: float) -> dict:
    return {"milliseconds": {name: {"median": time} for name, time in milliseconds.items()}}


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """bench/tables.py on two kernels: of one, two shapes were timed and one failed; the other's only shape failed."""
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("tables")
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    launch = {"chip": "sm_90", "registers": 40, "spilled_bytes": 0}
    cases = [("norm", "small"), ("norm", "large"), ("norm", "odd"), ("update", "all"), ("attention", "long")]
    known = {"triton": "3", "torch": "2", "commit": "0123456789", "date": "2026-01-01", "device": "a GPU"}
    compiled = [{"kernel": k, "case": c, "launches": [launch] if k != "attention" else []} for k, c in cases]
    timed = [
        took(ours=2.0, eager=6.0, compiled=3.0),
        took(ours=1.0, eager=2.0, compiled=0.5),
        {"failed": "out of memory"},
        {"failed": "no such library"},
        took(ours=1.0, flash=1.0),
    ]
    timed = [{"kernel": k, "case": c} | row for (k, c), row in zip(cases, timed)]
    write_json(tmp_path / "throughput-cpu-2026-01-01.json", {"machine": known, "results": compiled})
    write_json(tmp_path / "throughput-nvidia-2026-01-01.json", {"machine": known, "results": timed})
    return module


def cells(table: str) -> list[list[str]]:
    rows = [line for line in table.splitlines() if line.startswith("|")]
    return [row.removeprefix("| ").removesuffix(" |").split(" | ") for row in rows[2:]]


def test_the_table_in_brief_counts_the_shapes_that_failed(tables):
    assert cells(tables.kernels_in_brief()) == [
        ["norm", "3, 1 failed", "2.00x to 3.00x", "0.50x to 1.50x", "0.50x to 1.50x"],
        ["update", "1, 1 failed", "", "", ""],
        ["attention over more than 128 keys", "1", "", "", "1.00x"],
    ]


def test_the_whole_table_says_why_a_shape_failed(tables):
    rows = {row[1]: row for row in cells(tables.kernels())}
    assert rows["odd"][:6] == ["norm", "odd", "1", "40", "0", "failed: out of memory"]
    assert rows["large"] == ["norm", "large", "1", "40", "0", "1", "2.00x", "0.50x", "0.50x (compiled)"]
    assert rows["all"][5] == "failed: no such library"
