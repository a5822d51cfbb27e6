"""The quickstart notebook: its code runs cell by cell, and its stored outputs hold no error."""

import json
from pathlib import Path

import matplotlib
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


@pytest.fixture
def cells() -> list[dict]:
    return [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]


def test_it_was_executed_in_order_without_an_error(cells):
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for cell in cells for output in cell["outputs"]]
    pictures = [o for cell in cells for o in cell["outputs"] if "image/png" in o.get("data", {})]
    assert "error" not in kinds and len(pictures) >= 3


def test_its_code_runs(cells, tmp_path, monkeypatch):
    """With a budget of seconds, in an empty folder."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUICKSTART_IMAGES", "32")
    names: dict = {}
    for number, cell in enumerate(cells):
        exec(compile("".join(cell["source"]), f"cell {number}", "exec"), names)  # noqa: S102 - our own notebook
    assert (tmp_path / "runs" / "quickstart" / "diffusers" / "unet" / "config.json").exists()
