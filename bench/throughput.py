"""Kernels against every peer that is installed and against the bytes they must move: table, JSON and, on a GPU, a PNG.

    python bench/throughput.py                          # everything
    python bench/throughput.py --kernel attention --case level_16_words --dtype bf16 --json out.json

On a GPU: medians and quartiles of interleaved rounds of CUDA graph replays, with the L2 cache flushed before each, and
the copy bandwidth measured in the same process. Without one: what the compiler reports for every launch, and the
reference's time on this CPU, marked as such; the GPU's columns say "not yet measured", and nothing is inferred.
"""

import argparse
import sys
from pathlib import Path

import peers
import torch
from bars import backward_median, bars, timed
from clocks import copy_bandwidth, interleaved, spread, time_on_cpu
from harness import CHIPS, resources
from record import NOT_MEASURED, command, installed, machine, refuse, result_path, table, write_json
from subjects import SUBJECTS, forward_backward, launches_of, leaves
from torch.utils._pytree import tree_leaves

from duotone.kernels import attention_backends

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ------------------------------------------------------------------------------------------------------------ runs


def measure_on_cpu(subject, case, dtype, chips):
    """The compiler's view of every launch, and the definition's time on one core, for a small case in fp32."""
    rows = []
    for launch in launches_of(subject, case, dtype):
        for chip in chips:
            found = resources(launch, chip)
            rows.append({"launch": launch.name, "chip": f"sm_{chip}"} | vars(found))
    small = subject.shrink(case)
    inputs = subject.draw(small, torch.float32, "cpu")
    milliseconds = time_on_cpu(forward_backward(subject.reference, inputs))
    return {"launches": rows, "cpu_reference_ms_small_fp32": milliseconds, "gpu": NOT_MEASURED}


def measure_on_gpu(subject, case, dtype, rounds, device="cuda"):
    """Times every contender on the same inputs, except one with a wrong result or that no CUDA graph can capture."""
    apart = difference(subject, subject.ours, case, dtype, device)
    if not apart < _ALLOWED:
        return {"failed": f"differs from its definition by {apart:.3g} of its size; nothing was timed"}
    inputs = subject.draw(case, dtype, device)
    contenders, absent = contenders_for(subject, case, dtype, inputs, device)
    forwards = {f"{name}, forward": _forward(call, inputs) for name, call in contenders.items() if leaves(inputs)}
    runs = {name: forward_backward(call, inputs) for name, call in contenders.items()}
    times = {name: spread(values) for name, values in interleaved(runs | forwards, rounds, device).items()}
    floor = subject.floor(case, dtype)
    return {
        "milliseconds": {name: times[name] for name in runs},
        "forward_milliseconds": {name: times[f"{name}, forward"] for name in runs if forwards},
        "absent": absent,
        "difference": apart,
        "floor_bytes": floor,
        "gigabytes_per_second": {name: floor / times[name]["median"] / 1e6 for name in runs},
    }


def contenders_for(subject, case, dtype, inputs, device) -> tuple[dict, dict]:
    """Calls that can be timed, ours first, and why each of the others cannot."""
    contenders, absent = {"ours": subject.ours}, {}
    for name, factory in subject.peers.items():
        try:
            call = factory()
            if "torch's noise" not in name:
                _refuse_wrong(subject, call, case, dtype, device)
            interleaved({name: forward_backward(call, inputs)}, 1, device)
            contenders[name] = call
        except Exception as error:
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return contenders, absent


_ALLOWED = 0.02
_ALLOWED_TO_PEERS = 0.1  # a peer may round in its own way, but a peer with another result does not do the same job


def _refuse_wrong(subject, call, case, dtype, device):
    apart = difference(subject, call, case, dtype, device)
    if not apart < _ALLOWED_TO_PEERS:
        raise ValueError(f"its result differs from the definition by {apart:.3g} of its size")


def difference(subject, call, case, dtype, device) -> float:
    """The largest error of a call's results on a small case, relative to the definition's norm."""
    torch.manual_seed(0)
    inputs = subject.draw(subject.shrink(case), dtype, device)
    clones = {name: _clone(value) for name, value in inputs.items()}
    mine = (*forward_backward(call, inputs)(), *_numbers(inputs))  # some are updated in place
    truth = (*forward_backward(subject.reference, clones)(), *_numbers(clones))
    errors = [
        (a.detach().double() - b.detach().double()).norm() / b.double().norm().clamp(min=1e-20)
        for a, b in zip(mine, truth)
    ]
    return max(error.item() for error in errors)


def _numbers(inputs):
    return [leaf.detach() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _forward(call, inputs):
    return lambda: call(inputs)


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {name: _clone(item) for name, item in value.items()}
    return type(value)(_clone(item) for item in value) if isinstance(value, (list, tuple)) else value


def _print_cpu(results):
    rows = []
    for result in results:
        for launch in result["launches"]:
            named = {
                "kernel": result["kernel"],
                "case": result["case"],
                "launch": launch["launch"],
                "chip": launch["chip"],
            }
            rows.append(named | {name: launch[name] for name in list(launch)[2:]} | {"gpu time": NOT_MEASURED})
    print(table(rows))
    rows = [
        {
            "kernel": r["kernel"],
            "case": r["case"],
            "definition on one CPU core, one small image, fp32, ms": r["cpu_reference_ms_small_fp32"],
        }
        for r in results
    ]
    print("\n" + table(rows))


def _print_gpu(results, ceiling):
    print(f"copy bandwidth of this process: {ceiling:.0f} GB/s\n")
    rows = []
    for result in timed(results):
        ours = result["milliseconds"]["ours"]["median"]
        for name, time in result["milliseconds"].items():
            share = result["gigabytes_per_second"][name] / ceiling
            row = {"kernel": result["kernel"], "case": result["case"], "who": name, "ms": time["median"]}
            row |= {"low": time["low"], "high": time["high"], "of ceiling": share, "ours is": time["median"] / ours}
            rows.append(row | {"backward ms": backward_median(result, name) or ""})
    print(table(rows))
    for result in results:
        if "failed" in result:
            print(f"{result['kernel']} {result['case']}: FAILED: {result['failed']}")
        for name, reason in result.get("absent", {}).items():
            print(f"{result['kernel']} {result['case']}: without {name}: {reason}")
    for choice in attention_backends.choices():
        print(f"attention chose {choice}")
    print("\n" + table(bars(results, ceiling)))


def _draw_chart(results, path):
    """One row per case, with everyone's time as a multiple of ours."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = timed(results)
    names = list(dict.fromkeys(name for result in results for name in result["milliseconds"]))
    figure, axes = pyplot.subplots(figsize=(13, 2 + 0.24 * len(results)))
    for index, name in enumerate(names):
        here = [(row, r["milliseconds"]) for row, r in enumerate(results) if name in r["milliseconds"]]
        times = [of_all[name]["median"] / of_all["ours"]["median"] for _, of_all in here]
        axes.scatter(times, [row for row, _ in here], label=name, marker="os^Dv*P"[index % 7], zorder=2)
    axes.set_yticks(range(len(results)), [f"{r['kernel']} {r['case']}" for r in results])
    axes.grid(axis="both", alpha=0.3)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 4, 8, 16, 32], ["0.5", "1", "2", "4", "8", "16", "32"])
    axes.set_xlabel("time, as a multiple of ours")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernel", choices=SUBJECTS, help="one kernel (default: all)")
    parser.add_argument("--case", help="one case by name (default: all that are timed)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--json", type=Path, help="where the record goes (default: bench/results/)")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds on a GPU")
    parser.add_argument(
        "--chips", type=int, nargs="+", choices=CHIPS, default=[90], help="compile for these without a GPU"
    )
    return parser.parse_args()


def _chosen(kernel, case):
    pairs = [(s, c) for s in SUBJECTS.values() for c in s.cases if c.timed or c.name == case]
    pairs = [(s, c) for s, c in pairs if kernel in (None, s.name) and case in (None, c.name)]
    if not pairs:
        there = [c.name for s in SUBJECTS.values() for c in s.cases if kernel in (None, s.name)]
        refuse(f"no case{f' of {kernel}' if kernel else ''} is called {case}; there are: {', '.join(there)}")
    return pairs


def _path_of(options) -> Path | None:
    """The record's path; a partial run has none without --json, because it must not replace a whole record."""
    whole = (options.kernel, options.case, options.dtype, options.chips) == (None, None, "bf16", [90])
    return result_path(options.json, "throughput") if whole or options.json else None


def main():
    """Measure what was asked for, print it, and leave a record, written after every case."""
    options = _parse()
    if options.rounds < 1:
        refuse(f"--rounds {options.rounds}: it must be at least 1")
    dtype, on_gpu, results = DTYPES[options.dtype], torch.cuda.is_available(), []
    path = _path_of(options)
    about = machine() | {"peers": {name: installed(name) for name in peers.PACKAGES}}
    record = {"command": command(), "machine": about, "results": results}
    if on_gpu:
        record["copy_gigabytes_per_second"] = ceiling = copy_bandwidth()
    for subject, case in _chosen(options.kernel, options.case):
        print(f"{subject.name} {case.name} ...", file=sys.stderr, flush=True)
        named = {"kernel": subject.name, "case": case.name, "why": case.why, "dtype": options.dtype}
        results.append(named | _measured(subject, case, dtype, on_gpu, options))
        if on_gpu:
            record |= {"attention_choices": attention_backends.choices(), "bars": bars(results, ceiling)}
        if path:
            write_json(path, record)
    if on_gpu:
        _print_gpu(results, ceiling)
        try:
            if path:
                _draw_chart(results, path.with_suffix(".png"))
        except ImportError as error:
            print(f"no chart: {error}", file=sys.stderr)
    else:
        _print_cpu(results)
    print(f"\nrecord: {path}" if path else "\na partial run leaves no record: give --json FILE to keep one")
    sys.exit(1 if any("failed" in result for result in results) else 0)


def _measured(subject, case, dtype, on_gpu, options) -> dict:
    if not on_gpu:
        return measure_on_cpu(subject, case, dtype, options.chips)
    try:
        return measure_on_gpu(subject, case, dtype, options.rounds)
    except Exception as error:  # the other cases are still worth measuring
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    main()
