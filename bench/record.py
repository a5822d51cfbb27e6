"""What a result records about the machine and commit it comes from, how it is written and how it is shown."""

import contextlib
import datetime
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not yet measured"


def refuse(line: str) -> None:
    """Prints one line and ends the process with exit code 2."""
    print(f"duotone: refused: {line}", file=sys.stderr)
    sys.exit(2)


def machine() -> dict:
    """What a reader must know to repeat a figure."""
    record = {name: installed(name) for name in ("torch", "triton", "diffusers")}
    record |= {"python": platform.python_version(), "commit": _git("rev-parse", "HEAD")}
    record |= {"date": datetime.date.today().isoformat()}
    if not torch.cuda.is_available():
        cpu = {"device": "cpu", "cores": os.cpu_count(), "threads": torch.get_num_threads()}
        return record | cpu | {"load_average": load_average()}
    properties = torch.cuda.get_device_properties(0)
    record |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    query = ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"]
    with contextlib.suppress(OSError):
        record["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return record


def installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def load_average() -> float:
    """How many processes wanted a core during the last minute: a sign of how disturbed a CPU's figures are."""
    return round(os.getloadavg()[0], 2)


def command() -> str:
    """The command that reproduces this result."""
    script = Path(sys.argv[0])
    return " ".join(["python", f"bench/{script.name}", *sys.argv[1:]])


def _git(*arguments):
    result = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=Path(__file__).parent)
    return result.stdout.strip()


def result_path(asked: Path | None, name: str) -> Path:
    """Where a result goes: --json, or one file per bench, device and date; refused at once if it cannot be written."""
    path = asked or RESULTS / f"{name}-{device()}-{datetime.date.today().isoformat()}.json"
    refuse_unwritable(path)
    return path


def device() -> str:
    """The device's name as used in file names."""
    return torch.cuda.get_device_name(0).replace(" ", "-").lower() if torch.cuda.is_available() else "cpu"


def refuse_unwritable(path: Path, flag: str = "--json") -> None:
    try:
        there = path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError as error:
        refuse(f"{path} cannot be written ({error.strerror}): give another {flag}")
    if not there:
        path.unlink()


def write_json(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")


def table(rows: list[dict]) -> str:
    """Rows as aligned columns, in the order of the first row's keys."""
    if not rows:
        return ""
    columns = list(rows[0])
    cells = [columns, *([_cell(row.get(column, "")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in cells)


def _cell(value):
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)
