"""Counts every kernel and case without a GPU: launches, bytes against the floor, registers, spills, occupancy.

    python bench/ledger.py                 # table and bench/results/ledger.json
    python bench/ledger.py --check         # the same for sm_90 alone; exit code 1 if a gate fails
    python bench/ledger.py --chips 80 90   # compile for these

Bytes come from the interpreter's own loads and stores on one image (maps of at most 36 x 36). The floor of the path
taken counts every argument of every launch once, or twice if it is updated in place. A predicted time is the floor's
bytes at nine tenths of the data sheet's bandwidth plus two microseconds per launch: a prediction to be checked later,
not a measurement.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import step_counters
import torch
from harness import CHIPS, compile_key, counting_launches, resources
from record import NOT_MEASURED, RESULTS, command, machine, refuse_unwritable, table, write_json
from subjects import SUBJECTS, forward_backward, launches_of

from duotone.kernels import attention

DTYPE = torch.bfloat16
COUNTED = torch.float16  # as wide as bf16, and many times faster to interpret
GATED_CHIP = 90
RECORD = RESULTS / "ledger.json"
_IN_PLACE = {"adamw_ema": {"master", "exp_avg", "exp_avg_sq", "first", "second"}}
_SLACK = 1.02
_SHARE_OF_BANDWIDTH = 0.9
_LAUNCH_MICROSECONDS = 2.0


def timed():
    """Kernels with those of their timed cases that launch something, in the order of SUBJECTS."""
    for subject in SUBJECTS.values():
        for case in subject.cases:
            if case.timed and launches_of(subject, case, DTYPE):
                yield subject, case


def path_floor(subject, case) -> int:
    """Bytes of every argument of every launch, counted once, or twice if it is updated in place."""
    total = 0
    for launch in launches_of(subject, case, DTYPE):
        tensors = {id(v): (name, v) for name, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
        for name, tensor in tensors.values():
            total += tensor.nbytes * (2 if name in _IN_PLACE.get(subject.name, ()) else 1)
    return total


# --------------------------------------------------------------------------------------------------------- traffic


def count_traffic() -> list[dict]:
    """Run every case for one image through the interpreter; called in a process of its own."""
    rows = []
    for subject, case in timed():
        small = subject.shrink(case)
        inputs = subject.draw(small, COUNTED, "cpu")
        with counting_launches() as launches:
            forward_backward(subject.ours, inputs)()
        rows.append({"kernel": subject.name, "case": case.name, "launches": [asdict(launch) for launch in launches]})
    return rows


def begin_counting() -> subprocess.Popen:
    """Counts in a separate process, since kernels choose the interpreter when imported; the compiler runs meanwhile."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, __file__, "--count-traffic"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def traffic_of_all(counting: subprocess.Popen) -> dict[tuple[str, str], list[dict]]:
    counted, said = counting.communicate()
    if counting.returncode:
        sys.exit(f"counting bytes failed:\n{said}")
    return {(row["kernel"], row["case"]): row["launches"] for row in json.loads(counted.splitlines()[-1])}


# ---------------------------------------------------------------------------------------------------------- ledger


def ledger(chips) -> list[dict]:
    """One row per kernel and case."""
    counting, cases = begin_counting(), list(timed())
    launches = [launches_of(subject, case, DTYPE) for subject, case in cases]
    used = resources_of_all([(chip, launch) for made in launches for launch in made for chip in chips])
    traffic, rows = traffic_of_all(counting), []
    for (subject, case), made in zip(cases, launches):
        small, moved = subject.shrink(case), traffic[subject.name, case.name]
        floor, ideal = path_floor(subject, small), subject.floor(small, DTYPE)
        row = {"kernel": subject.name, "case": case.name, "launches": len(moved)}
        row |= {"bytes": sum(launch["distinct"] for launch in moved), "path_floor": floor, "ideal": ideal}
        row |= {"requested": sum(launch["loaded"] + launch["stored"] for launch in moved)}
        row["programs"] = {
            f"{launch.name} sm_{chip}": used[chip, *compile_key(launch)] for launch in made for chip in chips
        }
        row["predicted_microseconds"] = {
            CHIPS[chip].name: _predict(path_floor(subject, case), len(moved), CHIPS[chip]) for chip in chips
        }
        rows.append(row | {"measured_microseconds": NOT_MEASURED})
    return rows


_to_compile: list[tuple] = []


def resources_of_all(wanted) -> dict[tuple, dict]:
    """What every distinct program occupies, by chip and compile key; compiled in one process per core."""
    different = {(chip, *compile_key(launch)): (chip, launch) for chip, launch in wanted}
    # Kernels cannot be pickled: a forked process has them already, and is only told a number.
    _to_compile[:] = different.values()
    print(f"compiling {len(different)} programs ...", file=sys.stderr, flush=True)
    with multiprocessing.get_context("fork").Pool() as pool:
        found = pool.map(_resources_of, range(len(different)), chunksize=1)
    return dict(zip(different, found))


def _resources_of(number):
    chip, launch = _to_compile[number]
    return asdict(resources(launch, chip))


def _predict(floor_bytes, launches, chip):
    seconds = floor_bytes / (chip.gigabytes_per_second * 1e9 * _SHARE_OF_BANDWIDTH)
    return round(seconds * 1e6 + launches * _LAUNCH_MICROSECONDS, 1)


def violations(rows, before) -> list[str]:
    """A line for everything that fails a gate.

    Gates are: no spills and an occupancy above 0 on sm_90, bytes at the path's floor, no more launches than in the
    committed ledger, and no fused multiply-adds in kernels that promise the same bits on every device.
    """
    found = []
    committed = {(row["kernel"], row["case"]): row["launches"] for row in before}
    for row in rows:
        name = f"{row['kernel']} {row['case']}"
        if row["bytes"] > _SLACK * row["path_floor"]:
            found.append(f"{name}: moves {row['bytes']} bytes, floor of its path is {row['path_floor']}")
        if row["launches"] > committed.get((row["kernel"], row["case"]), row["launches"]):
            found.append(f"{name}: {row['launches']} launches, the committed ledger has fewer")
        for program, used in row["programs"].items():
            if program.endswith(f"sm_{GATED_CHIP}") and (used["spilled_bytes"] or not used["occupancy"]):
                found.append(f"{name}: {program} spills {used['spilled_bytes']} bytes, occupancy {used['occupancy']}")
            if _must_round_like_a_cpu(row) and used["fused_multiply_adds"]:
                found.append(f"{name}: {program} has {used['fused_multiply_adds']} fused multiply-adds")
    return found


def _must_round_like_a_cpu(row):
    return row["kernel"] == "diffuse"


def show(rows) -> str:
    lines = []
    for row in rows:
        for program, used in row["programs"].items():
            line = {"kernel": row["kernel"], "case": row["case"], "program": program}
            line |= {
                "bytes / floor": row["bytes"] / row["path_floor"],
                "floor / ideal": row["path_floor"] / row["ideal"],
            }
            line |= {"asked / bytes": row["requested"] / row["bytes"], "registers": used["registers"]}
            line |= {"spilled": used["spilled_bytes"], "shared": used["shared_bytes"], "warps": used["warps"]}
            line |= {"load": used["load_bits"], "store": used["store_bits"], "occupancy": used["occupancy"]}
            lines.append(
                line | {"measured": row["measured_microseconds"] if used["occupancy"] else "does not fit here"}
            )
    return table(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only sm_90; exit code 1 if a gate fails")
    parser.add_argument(
        "--kernels-alone", action="store_true", help="leave out the compiled step, which trains for a minute"
    )
    parser.add_argument("--chips", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--count-traffic", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    # Bytes are counted on one image, which must be divided among programs as the whole batch is.
    attention._ENOUGH_PROGRAMS = 1
    if options.count_traffic:
        print(json.dumps(count_traffic()))
        return
    if not (options.check or options.kernels_alone):
        refuse_unwritable(options.json)
    rows = ledger([GATED_CHIP] if options.check else options.chips)
    print(show(rows))
    step = {} if options.kernels_alone else step_counters.counters()
    if step:
        print("\n" + step_counters.show(step))
    before = json.loads(RECORD.read_text())["rows"] if RECORD.exists() else []
    found = violations(rows, before) + (step_counters.violations(step) if step else [])
    held = "every gate passes: no spills on sm_90, bytes at the floor, launches as committed"
    if not step:
        print("without the compiled step: no record is written")
    print("\n".join(found) or held + (", no graph break or recompile" if step else ""))
    if not options.check and step:
        write_json(options.json, {"command": command(), "machine": machine(), "rows": rows, "step": step})
        print(f"record: {options.json}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
