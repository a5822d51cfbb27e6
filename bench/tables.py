"""Writes the README's tables from the JSON files under bench/results: a figure without a file cannot appear.

python bench/tables.py            rewrites the tables
python bench/tables.py --check    says whether they are up to date (exit code 1 if not)
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def newest(pattern: str) -> tuple[Path, dict]:
    path = sorted(RESULTS.glob(pattern))[-1]
    return path, json.loads(path.read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(path: Path) -> str:
    return f"\n\n[{path.name}](bench/results/{path.name})"


def demo() -> str:
    path, result = newest("captioned_shapes-*.json")
    checker = result["checker"]
    rows = [
        [name.replace("_", " "), f"{result[name]:.0%}", f"{checker[name]:.0%}" if name in checker else ""]
        for name in ("background", "colour", "colour_and_background", "shape", "everything")
    ]
    return table(
        [f"right in {result['samples']} pictures, one for each caption", "model", "checker on real renders"], rows
    ) + source(path)


def kernels() -> str:
    path, result = newest("throughput-cpu-*.json")
    rows = []
    for row in result["results"]:
        launches = [launch for launch in row["launches"] if launch["chip"] == "sm_90"]
        if launches:
            rows.append(
                [
                    row["kernel"],
                    row["case"],
                    row["dtype"],
                    str(len(launches)),
                    str(max(launch["registers"] for launch in launches)),
                    str(sum(launch["spilled_bytes"] for launch in launches)),
                    row["gpu"],
                ]
            )
    return table(["kernel", "case", "type", "launches", "registers (sm_90)", "spilled bytes", "GPU"], rows) + source(
        path
    )


def loader() -> str:
    path, result = newest("loader-*.json")
    rows = []
    for row in result["results"]:
        ours = {name: c for name, c in row["contenders"].items() if name.startswith("ours")}
        for name, contender in ours.items():
            ratios = {k.removeprefix("times "): v for k, v in contender.items() if k.startswith("times ")}
            rows.append(
                [row["job"], name, f"{contender['images_per_cpu_second']:,.0f}"]
                + [f"{ratios[peer]:.2f}x" if peer in ratios else "" for peer in ("webdataset + Pillow", "plain DALI")]
            )
    head = ["job", "reader", "images per CPU-second", "webdataset + Pillow", "plain DALI"]
    return table(head, rows) + source(path)


TABLES = {"demo": demo, "kernels": kernels, "loader": loader}


def written(text: str) -> str:
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(pattern, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)
        if found != 1:
            sys.exit(f"README.md has {found} places for the table {name!r}: it needs one")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    text = written(readme.read_text())
    if "--check" in sys.argv:
        if text != readme.read_text():
            sys.exit("README.md's tables differ from bench/results: run python bench/tables.py")
        return
    readme.write_text(text)


if __name__ == "__main__":
    main()
