"""Writes the tables of the README and of docs/ from the JSON under bench/results: a figure without a file cannot appear.

python bench/tables.py            rewrites the tables
python bench/tables.py --check    says whether they are up to date (exit code 1 if not)
"""

import argparse
import json
import re
import sys
from pathlib import Path

from record import RESULTS

ROOT = Path(__file__).parent.parent


def newest(pattern: str) -> tuple[Path, dict]:
    """The file with the latest date in its name, whatever machine it is from, and its content."""
    path = max(RESULTS.glob(pattern), key=lambda path: (re.findall(r"\d{4}-\d{2}-\d{2}", path.stem), path.name))
    return path, json.loads(path.read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(path: Path) -> str:
    """A link to the file that a table was made from; written() makes it relative to the table's page."""
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
    """What the compiler reports for every launch, and our times on a GPU beside everyone else's."""
    path, compiled = newest("throughput-cpu-*.json")
    gpu_path, timed = newest("throughput-nvidia-*.json")
    launched = {(row["kernel"], row["case"]): row["launches"] for row in compiled["results"]}
    rows = [
        [row["kernel"], row["case"], *occupied(launched.get((row["kernel"], row["case"]), [])), *beside_others(row)]
        for row in timed["results"]
    ]
    name = timed["machine"]["device"]
    head = ["kernel", "case", "launches", "registers", "spilled bytes", f"ms, {name}", "eager", "torch.compile"]
    builds = f"Launches, registers and spilled bytes: {build(compiled)}. Times: {build(timed)}.\n\n"
    return builds + table([*head, "the fastest other"], rows) + source(gpu_path) + source(path)


def kernels_in_brief() -> str:
    """A row for each kernel: the range of its ratios over all shapes that were timed."""
    path, timed = newest("throughput-nvidia-*.json")
    launched = {
        (row["kernel"], row["case"]) for row in newest("throughput-cpu-*.json")[1]["results"] if row["launches"]
    }
    by_name: dict[str, list[dict]] = {}
    for row in timed["results"]:
        failed, found = "milliseconds" not in row, times_ours(row)
        if failed or found:
            chosen = row["kernel"] == "attention" and (row["kernel"], row["case"]) not in launched
            name = "attention over more than 128 keys" if chosen else row["kernel"]
            by_name.setdefault(name, []).append({} if failed else found | {"fastest": min(found.values())})
    rows = [
        [name, shapes(of), *(over(of, who) for who in ("eager", "compiled", "fastest"))] for name, of in by_name.items()
    ]
    return table(["kernel", "shapes", "eager", "torch.compile", "the fastest other"], rows) + source(path)


def times_ours(row: dict) -> dict[str, float]:
    """Everybody else's time as a multiple of ours; empty if the case failed."""
    times = {name: time["median"] for name, time in row.get("milliseconds", {}).items() if name != "in turns"}
    ours = times.pop("ours", None)
    return {name: time / ours for name, time in times.items()}


def shapes(ratios: list[dict]) -> str:
    failed = ratios.count({})
    return f"{len(ratios)}" + (f", {failed} failed" if failed else "")


def over(ratios: list[dict], who: str) -> str:
    found = sorted(row[who] for row in ratios if who in row)
    if not found or found[0] == found[-1]:
        return f"{found[0]:.2f}x" if found else ""
    return f"{found[0]:.2f}x to {found[-1]:.2f}x"


def build(result: dict) -> str:
    """The versions and the commit that a result was made with."""
    machine = result["machine"]
    return f"triton {machine['triton']}, torch {machine['torch']}, commit {machine['commit'][:8]} of {machine['date']}"


def occupied(launches: list[dict]) -> list[str]:
    """Launches, registers and spilled bytes on Hopper; empty for other people's kernels."""
    here = [launch for launch in launches if launch["chip"] == "sm_90"]
    most = [str(max(launch[name] for launch in here)) if here else "" for name in ("registers", "spilled_bytes")]
    return [str(len(here)) if here else "", *most]


def beside_others(row: dict) -> list[str]:
    """Our milliseconds, and the others' as multiples of them."""
    if "milliseconds" not in row:
        return [f"failed: {row['failed']}", "", "", ""]
    ours, others = row["milliseconds"]["ours"]["median"], times_ours(row)
    named = [f"{others[name]:.2f}x" if name in others else "" for name in ("eager", "compiled")]
    fastest = min(others, key=others.get, default=None)
    return [f"{ours:.3g}", *named, f"{others[fastest]:.2f}x ({fastest})" if fastest else ""]


def targets() -> str:
    path, result = newest("throughput-nvidia-*.json")
    rows = [
        [row["bar"], f"{row['found']:.2f}", row["wanted"], "yes" if row["holds"] else "no"] for row in result["bars"]
    ]
    return table(["", "found", "target", "met"], rows) + source(path)


def predicted() -> str:
    """Times on a GPU against those that the ledger predicted before any GPU was available."""
    path, ledger = newest("ledger.json")
    _, timed = newest("throughput-nvidia-*.json")
    found = {(row["kernel"], row["case"]): row for row in timed["results"]}
    by_kernel: dict[str, list[float]] = {}
    for row in ledger["rows"]:
        there = found.get((row["kernel"], row["case"]), {}).get("milliseconds")
        if there:
            foretold = row["predicted_microseconds"]["H100 SXM"]
            by_kernel.setdefault(row["kernel"], []).append(1e3 * there["ours"]["median"] / foretold)
    rows = [[name, str(len(of)), f"{min(of):.2f} to {max(of):.2f}"] for name, of in by_kernel.items()]
    return table(["kernel", "cases", "time over the predicted one"], rows) + source(path)


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


def step() -> str:
    path, result = newest("train_step-*.json")
    head = ["", "ms a step", "x diffusers eager", "of the matrix product's rate", "convolution", "norm", "attention"]
    rows = []
    for name, row in result["contenders"].items():
        shares = row.get("shares", {})
        rows.append(
            [name, f"{row['milliseconds']:.0f}", f"{row['times_diffusers_eager']:.2f}"]
            + [f"{row['share_of_matmul_rate']:.0%}"]
            + [f"{shares[part]:.0%}" if shares else "" for part in head[4:]]
        )
    return setting_of(result) + table(head, rows) + source(path)


def counts() -> str:
    path, result = newest("train_step-*.json")
    ghost = result["as_on_a_gpu"]
    head = ["", "operator calls", "MB an image", "changes of layout", "MB an image in these"]
    rows = [
        [name, f"{row['operators']:,}", f"{row['megabytes_per_image']:,.0f}", str(row["layout_changes"])]
        + [f"{row['layout_megabytes_per_image']:.1f}"]
        for name, row in ghost["counts"].items()
    ]
    what = f"{ghost['network']} network, {ghost['batch']} images of {ghost['size']} px, {ghost['dtype']}, forward and backward\n\n"
    return what + table(head, rows) + source(path)


def convolution() -> str:
    path, result = newest("conv-*.json")
    totals = result["totals"]
    head = ["pass", *next(iter(totals.values()))]
    rows = [
        [name, *(f"{value:.2f}x" if key == "ratio" else f"{value:.0f} ms" for key, value in total.items())]
        for name, total in totals.items()
    ]
    return setting_of(result) + table(head, rows) + source(path)


def sampling() -> str:
    path, result = newest("sampling-*.json")
    head = [
        "way",
        "images",
        "forwards an evaluation",
        "ms an image",
        "x two forwards",
        "largest difference, levels of 255",
    ]
    rows = []
    for row in result["results"]:
        apart = row["largest_pixel_difference"]
        rows.append(
            [row["way"], str(row["images"]), f"{row['forwards_per_evaluation']:.2f}"]
            + [f"{row['milliseconds_per_image']['median']:.0f}", f"{row['times_two_forwards']:.2f}"]
            + ["" if apart is None else f"{apart:.2f}"]
        )
    return setting_of(result) + table(head, rows) + source(path)


def intervals() -> str:
    path, result = newest("guidance-*.json")
    head = ["guidance", "from sigma", "to sigma", "forwards an evaluation", "colour and background right"]
    rows = [
        [f"{row['guidance']:g}", f"{row['from']:g}", row["to"], f"{row['forwards_per_evaluation']:.2f}"]
        + [f"{row['colour_and_background']:.0%}"]
        for row in result["quality"]
    ]
    return table(head, rows) + source(path)


def confirmed() -> str:
    path, result = newest("interval-*.json")
    found = result["confirmed"]
    head = [
        "interval",
        "forwards an evaluation",
        "pictures",
        "right",
        "right, guided everywhere",
        "difference, 95 % interval",
    ]
    apart = f"{found['difference']:+.1%} [{found['low']:+.1%}, {found['high']:+.1%}]"
    row = [f"{found['from']:g} to {found['to']:g}", f"{found['forwards_per_evaluation']:.2f}", f"{found['pictures']:,}"]
    return table(head, [[*row, f"{found['interval']:.1%}", f"{found['everywhere']:.1%}", apart]]) + source(path)


def switches() -> str:
    path, result = newest("switches-*.json")
    head = ["switch", "ms a step", "x as chosen", "MiB kept for the backward pass"]
    rows = [
        [row["switch"], row["why"], "", ""]
        if row["milliseconds"] is None
        else [
            row["switch"],
            f"{row['milliseconds']:.0f}",
            f"{row['times_as_chosen']:.2f}",
            f"{row['saved_mebibytes']:.0f}",
        ]
        for row in result["results"]
    ]
    return setting_of(result) + table(head, rows) + source(path)


def norms() -> str:
    path, result = RESULTS / "ledger.json", json.loads((RESULTS / "ledger.json").read_text())
    by_way = {}
    for row in result["rows"]:
        by_way.setdefault(row["kernel"], {})[row["case"]] = row
    cells = []
    for case, turns in by_way["group_norm_silu in turns"].items():
        cells.append([case])
        for row in (by_way["group_norm_silu"][case], turns):
            cells[-1] += [str(row["launches"]), f"{row['bytes'] / row['ideal']:.2f}"]
        cells[-1].append(f"{turns['requested'] / turns['ideal']:.2f}")
    head = ["map", "launches", "bytes", "launches in turns", "bytes in turns", "second reads included"]
    return table(head, cells) + source(path)


def blocks() -> str:
    path, result = RESULTS / "gpu_code.json", json.loads((RESULTS / "gpu_code.json").read_text())
    theirs = {row["block"]: row for row in result["results"] if row["who"] == "diffusers"}
    cells = []
    for row in result["results"]:
        total, base = (sum(r[f"{p}_mebibytes"] for p in ("forward", "backward")) for r in (row, theirs[row["block"]]))
        cells.append([row["block"], row["who"], f"{row['forward_launches']} + {row['backward_launches']}"])
        cells[-1] += [f"{row['forward_mebibytes']:,.0f} + {row['backward_mebibytes']:,.0f}", f"{total / base:.2f}"]
    head = ["block", "who", "launches, forward + backward", "MiB", "x diffusers"]
    return table(head, cells) + source(path)


def blocks_in_brief() -> str:
    path, result = RESULTS / "gpu_code.json", json.loads((RESULTS / "gpu_code.json").read_text())
    by_block: dict[str, dict] = {}
    for row in result["results"]:
        by_block.setdefault(row["block"], {})[row["who"]] = row
    cells = []
    for block, by_who in by_block.items():
        pair = [by_who["diffusers"], by_who["ours"]]
        launches = [str(row["forward_launches"] + row["backward_launches"]) for row in pair]
        mebibytes = [row["forward_mebibytes"] + row["backward_mebibytes"] for row in pair]
        cells.append([block, *launches, *(f"{size:,.0f}" for size in mebibytes), f"{mebibytes[1] / mebibytes[0]:.2f}"])
    head = ["block", "launches, diffusers", "launches, ours", "MiB, diffusers", "MiB, ours", "ratio of bytes"]
    return table(head, cells) + source(path)


def optimizers() -> str:
    path, result = RESULTS / "optimizers.json", json.loads((RESULTS / "optimizers.json").read_text())
    used, rows = result["core_seconds"], result["rows"]
    cells = [[f"{row['images']:,}", *(f"{row[name]:.3f}" for name in used)] for row in rows]
    cells.append(["core-seconds", *(f"{seconds:,.0f}" for seconds in used.values())])
    return table(["images", *(f"{name}: loss" for name in used)], cells) + source(path)


def bugs() -> str:
    path, result = newest("bugs-*.json")
    rows, brightness = {row["bug"]: row for row in result["results"]}, result["brightness_of_test_images"]
    cells = [["real test images", "", share(result["classifier"]), f"{result['floor']:.1f}", f"{brightness:.3f}"]]
    for bug, kind, says in result["pictured"]:
        found = rows[bug][kind]
        guidance = 1 if kind == "unguided" else result["guidance"]
        cells.append([says, f"{guidance:g}", share(found["accuracy"]), f"{found['frechet']:.1f}"])
        cells[-1].append(f"{found['brightness']:.3f}")
    head = ["what is wrong", "guidance", "recognised as asked", "Frechet distance", "mean brightness"]
    return table(head, cells) + source(path)


def bugs_in_training() -> str:
    path, result = newest("bugs-*.json")
    rows = []
    for row in result["results"]:
        losses, last = [level["loss"] for level in row["losses"]], row["last_step"]["loss"]
        rows.append([row["bug"], f"{row['training']['core_seconds']:.0f}", share(row["unguided"]["accuracy"])])
        rows[-1] += [f"{row['unguided']['frechet']:.1f}", f"{sum(losses) / len(losses):.4f}", f"{last:.4f}"]
    head = ["run", "core-seconds", "recognised at guidance 1", "Frechet distance at guidance 1"]
    return table([*head, "loss, mean of 8 levels", "loss at the last timestep"], rows) + source(path)


def share(found: dict) -> str:
    return f"{found['value']:.1%} [{found['low']:.1%}, {found['high']:.1%}]"


def setting_of(result: dict) -> str:
    """What was measured and on what, in a line above its table."""
    machine, batch = result["machine"], f"{result['batch']} images of " if "batch" in result else ""
    where = (
        f"{machine.get('threads', 1)} thread{'s' * (machine.get('threads', 1) > 1)} of a CPU"
        if machine["device"] == "cpu"
        else machine["device"]
    )
    load = f", load average {max(result['load_average']):.1f}" if machine["device"] == "cpu" else ""
    return f"{result['network']} network, {batch}{result['size']} px, {where}, {result['clock']}{load}\n\n"


PAGES = {
    "README.md": {
        "demo": demo,
        "kernels_in_brief": kernels_in_brief,
        "blocks_in_brief": blocks_in_brief,
        "loader": loader,
    },
    "docs/kernels.md": {
        "kernels": kernels,
        "targets": targets,
        "predicted": predicted,
        "norms": norms,
        "blocks": blocks,
    },
    "docs/speed.md": {
        "counts": counts,
        "step": step,
        "convolution": convolution,
        "sampling": sampling,
        "intervals": intervals,
        "confirmed": confirmed,
        "switches": switches,
        "optimizers": optimizers,
    },
    "docs/bugs.md": {"bugs": bugs, "bugs_in_training": bugs_in_training},
}


def written(text: str, page: str) -> str:
    """The page with its tables made anew, and their links relative to it."""
    up = "../" * page.count("/")
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        made = make().replace("](bench/", f"]({up}bench/")
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made}\n{m[2]}", text, flags=re.S)
        if found != 1:
            sys.exit(f"{page} has {found} places for the table {name!r}: it needs exactly one")
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a table is not up to date")
    check = parser.parse_args().check
    for page in PAGES:
        path = ROOT / page
        text = written(path.read_text(), page)
        if check and text != path.read_text():
            sys.exit(f"{page}'s tables differ from bench/results: run python bench/tables.py")
        if not check:
            path.write_text(text)


if __name__ == "__main__":
    main()
