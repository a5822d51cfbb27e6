"""Kernels against every peer that is present and against the bytes they must move: table, JSON and, on a GPU, a PNG.

    python bench/throughput.py                          # everything
    python bench/throughput.py --kernel attention --case level_16_words --dtype bf16 --json out.json

On a GPU: medians and quartiles of interleaved rounds, the level-2 cache emptied before each, graphs replayed, beside the
copy bandwidth measured in the same process. Without one: what the compiler says of every launch, and the reference's time
on this CPU, marked as such; the GPU's columns say "not yet measured", and nothing is inferred.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import peers
import torch
from harness import (
    CHIPS,
    RESULTS,
    copy_bandwidth,
    installed,
    interleaved,
    machine,
    recorded,
    resources,
    spread,
    table,
    time_on_cpu,
    write_json,
)
from torch.utils._pytree import tree_leaves

from duotone.kernels import adamw_ema, attention, diffuse, group_norm_silu, guided_step, squared_norm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
NOT_MEASURED = "not yet measured"

# -------------------------------------------------------------------------------------------------------- subjects


@dataclass(frozen=True)
class Subject:
    """One kernel as it is measured: its inputs for a case, the call, the definition, the bytes, the peers."""

    module: object
    draw: Callable  # (case, dtype, device) -> inputs by name
    ours: Callable
    reference: Callable
    floor: Callable  # (case, dtype) -> bytes that must move, forward and backward
    shrink: Callable  # case -> the same case small enough for the interpreter and a CPU
    peers: dict = field(default_factory=dict)  # name -> () -> call; the factory raises where the peer is absent
    label: str = ""  # the kernel's name by default
    covers: Callable = lambda case: True  # which of the module's cases

    @property
    def name(self) -> str:
        return self.label or self.module.NAME

    @property
    def cases(self) -> list:
        return [case for case in self.module.CASES if self.covers(case)]


def forward_backward(call, inputs):
    """The call, and where the kernel is trained the gradients of every leaf."""
    leaves = _leaves(inputs)

    def run():
        out = call(inputs)
        return (out, *torch.autograd.grad(out, leaves, inputs["gradient"])) if leaves else (out,)

    return run


def _draw_norm(case, dtype, device):
    x_NCHW = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(case.shape[1], device=device, requires_grad=True) for _ in range(2)]
    gradient = torch.randn(case.shape, dtype=dtype, device=device).contiguous(memory_format=torch.channels_last)
    named = {"x": x_NCHW.requires_grad_(), "weight": weights[0], "bias": weights[1]}
    named |= {"groups": case.groups, "gradient": gradient}
    for name in peers.MODULATION if case.modulated else ():
        named[name] = torch.randn(case.shape[:2], dtype=dtype, device=device, requires_grad=True)
    return named


def _norm(function):
    def call(i):
        modulation = {name: i[name] for name in peers.MODULATION if name in i}
        return function(i["x"], i["weight"], i["bias"], i["groups"], **modulation)

    return call


_in_turns = functools.partial(group_norm_silu.group_norm_silu, in_turns=True)


def _has_turns(case):
    """Maps larger than one program holds."""
    return case.timed and case.shape[2] * case.shape[3] >= 32 * 32


def _draw_attention(case, dtype, device):
    def tokens(length):
        shape = (case.images, length, case.heads, case.width)
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    mask_NM = None
    if case.masked:
        mask_NM = torch.ones(case.images, case.keys, dtype=torch.bool, device=device)
        mask_NM[:, case.keys // 4 :] = torch.arange(case.images, device=device)[:, None] % 2 == 0
    named = {"q": tokens(case.queries), "k": tokens(case.keys), "v": tokens(case.keys), "mask": mask_NM}
    return named | {"gradient": torch.randn_like(named["q"])}


def _attend(function):
    return lambda i: function(i["q"], i["k"], i["v"], mask_NM=i["mask"])


def _draw_diffuse(case, dtype, device):
    images = case.shape[0]
    image_NHWC = torch.randint(0, 256, case.shape, dtype=torch.uint8, device=device)
    flip_N = torch.zeros(images, dtype=torch.bool, device=device)
    coefficients_N4 = torch.rand(images, 4, device=device)
    positions_N = torch.arange(images, device=device)
    return {"arguments": (image_NHWC, flip_N, coefficients_N4, 1, positions_N, 0), "dtype": dtype}


def _draw_guided(case, dtype, device):
    images, *rest = case.shape
    prediction = torch.randn(2 * images, *rest, dtype=dtype, device=device)
    x_NCHW = torch.randn(case.shape, device=device)
    dense = [t.contiguous(memory_format=torch.channels_last) for t in (prediction, x_NCHW)]
    return {"arguments": (*dense, *torch.rand(3, images, device=device)), "rescale": case.rescale}


def _guide(function):
    @torch.no_grad()
    def call(i):
        return function(*i["arguments"], rescale=i["rescale"])

    return call


def _draw_update(case, dtype, device):
    def flat(kind=torch.float32):
        return torch.rand(case.parameters, dtype=kind, device=device)

    numbers = {name: torch.ones((), device=device) for name in ("lr", "step", "grad_scale")}
    options = numbers | {"betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}
    options["ema_decays"] = (0.999, 0.99)[: case.tracks]
    options["weights_out"] = None if case.weights is None else flat(case.weights)
    return {"state": (flat(), flat(case.grad), flat(), flat()), "emas": [flat() for _ in options["ema_decays"]]} | {
        "options": options
    }


def _update(function):
    def call(i):
        function(*i["state"], i["emas"], **i["options"])
        return i["state"][0]

    return call


def _draw_gradient(case, dtype, device):
    return {"grad": torch.randn(case.parameters, device=device).to(case.grad)}


def _second(function):
    return lambda i: function(i)[1]


def _sum_of_squares(function):
    return lambda i: function(i["grad"])


def _one_image(case):
    if hasattr(case, "parameters"):
        return replace(case, parameters=min(case.parameters, 2**18))
    if hasattr(case, "queries"):
        return replace(case, images=1, queries=min(case.queries, 1024), keys=min(case.keys, 1024))
    return replace(case, shape=(1, *case.shape[1:]))


def _one_small_map(case):
    """36 x 36 is already cut into several chunks, like every larger map."""
    _, channels, height, width = case.shape
    return replace(case, shape=(1, channels, min(height, 36), min(width, 36)))


def _norm_floor(case, dtype):
    return 5 * torch.Size(case.shape).numel() * dtype.itemsize


def _attention_floor(case, dtype):
    queries, keys = (case.images * length * case.heads * case.width for length in (case.queries, case.keys))
    return (5 * queries + 6 * keys) * dtype.itemsize


def _diffuse_floor(case, dtype):
    return (1 + dtype.itemsize + 4) * torch.Size(case.shape).numel()


def _guided_floor(case, dtype):
    return (2 * dtype.itemsize + 4 + 4) * torch.Size(case.shape).numel()


def _update_floor(case, dtype):
    weights = 0 if case.weights is None else case.weights.itemsize
    return (24 + case.grad.itemsize + 8 * case.tracks + weights) * case.parameters


SUBJECTS = {
    subject.name: subject
    for subject in [
        Subject(
            group_norm_silu,
            _draw_norm,
            _norm(group_norm_silu.group_norm_silu),
            _norm(group_norm_silu.group_norm_silu_reference),
            _norm_floor,
            _one_small_map,
            {
                "in turns": lambda: _norm(_in_turns),
                "eager": lambda: peers.eager_norm,
                "compiled": peers.compiled(peers.eager_norm),
                "apex": peers.apex_norm,
                "liger": peers.liger_norm,
                "channels-last-groupnorm": peers.channels_last_norm,
            },
        ),
        Subject(
            group_norm_silu,
            _draw_norm,
            _norm(_in_turns),
            _norm(group_norm_silu.group_norm_silu_reference),
            _norm_floor,
            _one_small_map,
            label="group_norm_silu in turns",
            covers=_has_turns,
        ),
        Subject(
            attention,
            _draw_attention,
            _attend(attention.attention),
            _attend(attention.attention_reference),
            _attention_floor,
            _one_image,
            {name: peers.backend(name) for name in attention.BACKENDS}
            | {
                "eager": lambda: peers.definition_of_attention,
                "compiled": peers.compiled(peers.definition_of_attention),
            },
        ),
        Subject(
            diffuse,
            _draw_diffuse,
            lambda i: diffuse.diffuse(*i["arguments"], dtype=i["dtype"])[1],
            lambda i: diffuse.diffuse_reference(*i["arguments"], dtype=i["dtype"])[1],
            _diffuse_floor,
            _one_image,
            peers={
                "eager": lambda: peers.definition_of_diffuse,
                "eager, torch's noise": lambda: lambda i: peers.diffuse_with_torchs_noise(i)[1],
                "compiled, torch's noise": lambda: _second(peers.compiled(peers.diffuse_with_torchs_noise)()),
            },
        ),
        Subject(
            guided_step,
            _draw_guided,
            _guide(guided_step.guided_step),
            _guide(guided_step.guided_step_reference),
            _guided_floor,
            _one_image,
            peers={
                "eager": lambda: peers.definition_of_guidance,
                "compiled": peers.compiled(peers.definition_of_guidance),
                "diffusers": peers.diffusers_guidance,
            },
        ),
        Subject(
            adamw_ema,
            _draw_update,
            _update(adamw_ema.adamw_ema_),
            _update(adamw_ema.adamw_ema_reference_),
            _update_floor,
            _one_image,
            peers={
                "torch fused + EMA + cast": peers.torch_update,
                "torch fused + diffusers' EMA + cast": peers.diffusers_update,
                "apex FusedAdamSWA": peers.apex_update,
            },
        ),
        Subject(
            squared_norm,
            _draw_gradient,
            _sum_of_squares(squared_norm.squared_norm),
            _sum_of_squares(squared_norm.squared_norm_reference),
            lambda case, dtype: case.grad.itemsize * case.parameters,
            _one_image,
            peers={"torch vector_norm": lambda: peers.torch_squared_norm},
        ),
    ]
}


def launches_of(subject, case, dtype):
    """What one call (and its gradients) would launch, without storage or device."""
    inputs = subject.draw(case, dtype, "meta")
    with recorded() as seen:
        forward_backward(subject.ours, inputs)()
    return seen


# ------------------------------------------------------------------------------------------------------------ runs


def measure_on_cpu(subject, case, dtype, chips):
    """The compiler's view of every launch, and the definition's time on one core, in fp32 and small."""
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
    """Every contender on the same inputs; one that gives a wrong result, or that no graph can hold, is not timed."""
    apart = difference(subject, subject.ours, case, dtype, device)
    if not apart < _ALLOWED:
        return {"failed": f"differs from its definition by {apart:.3g} of its size; nothing was timed"}
    inputs = subject.draw(case, dtype, device)
    contenders, absent = contenders_for(subject, case, dtype, inputs, device)
    forwards = {f"{name}, forward": _forward(call, inputs) for name, call in contenders.items() if _leaves(inputs)}
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
_ALLOWED_TO_PEERS = 0.1  # another's roundings are its own affair; another's result is not the same job


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
    errors = [(a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-20) for a, b in zip(mine, truth)]
    return max(float(error) for error in errors)


def _numbers(inputs):
    return [leaf.detach() for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor)]


def _leaves(inputs):
    return [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]


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
            rows.append(row | {"backward ms": _backward_median(result, name) or ""})
    print(table(rows))
    for result in results:
        if "failed" in result:
            print(f"{result['kernel']} {result['case']}: FAILED: {result['failed']}")
        for name, reason in result.get("absent", {}).items():
            print(f"{result['kernel']} {result['case']}: without {name}: {reason}")
    for choice in _attention_choices():
        print(f"attention chose {choice}")
    print("\n" + table(bars(results, ceiling)))


def timed(results) -> list[dict]:
    return [result for result in results if "milliseconds" in result]


def _backward_median(result, name):
    """What forward and backward take beyond forward alone, both replayed in the same rounds."""
    forward = result["forward_milliseconds"].get(name)
    return forward and result["milliseconds"][name]["median"] - forward["median"]


def _attention_choices() -> list[dict]:
    """Measured for shapes that PyTorch's and xformers' kernels serve, in words that JSON has."""
    return [choice | {"dtype": str(choice["dtype"])} for choice in attention.choices()]


# ------------------------------------------------------------------------------------------------------------ bars


def bars(results, ceiling) -> list[dict]:
    """What was promised for a data-centre GPU, as ratios of this run; a bar whose cases did not run has no row."""
    rows = [_norm_bar(results, ceiling)]
    rows += [_norm_ratio(results, "compiled", 2.5), _norm_ratio(results, "apex", 1.4)]
    words = [r for r in _of(results, "attention") if "words" in r["case"] and _backward_median(r, "ours")]
    others = [r for r in _of(results, "attention") if "words" not in r["case"]]
    if words:
        rows.append(
            _bar("attention, backward over 77 keys, times the best peer", min(map(_backward_ratio, words)), 2.0)
        )
    if others:
        rows.append(_bar("attention elsewhere, times the best peer", min(map(_ratio, others)), 0.98))
    updates = [r["gigabytes_per_second"]["ours"] / ceiling for r in _of(results, "adamw_ema")]
    if updates:
        rows.append(_bar("adamw_ema, share of copy bandwidth", min(updates), 0.9))
    return [row for row in rows if row]


def _of(results, kernel):
    return [result for result in timed(results) if result["kernel"] == kernel]


def _network_norms(results):
    """The reference network's own shapes, each once."""
    return [r for r in _of(results, "group_norm_silu") if r["case"].startswith(("level_", "skip_"))]


def _norm_bar(results, ceiling):
    norms = _network_norms(results)
    ideal = sum(r["floor_bytes"] for r in norms) / ceiling / 1e6
    found = sum(r["milliseconds"]["ours"]["median"] for r in norms)
    return _bar("group_norm_silu, times the ideal bytes", found / ideal, 1.25, at_most=True) if norms else None


def _norm_ratio(results, peer, wanted):
    both = [r["milliseconds"] for r in _network_norms(results) if peer in r["milliseconds"]]
    found = [sum(times[name]["median"] for times in both) for name in (peer, "ours")]
    return _bar(f"group_norm_silu, times {peer} ({len(both)} shapes)", found[0] / found[1], wanted) if both else None


def _ratio(result):
    """The fastest peer's time over ours."""
    times = {name: time["median"] for name, time in result["milliseconds"].items()}
    ours = times.pop("ours")
    return min(times.values(), default=ours) / ours


def _backward_ratio(result):
    times = {name: _backward_median(result, name) for name in result["milliseconds"]}
    ours = times.pop("ours")
    return min(times.values(), default=ours) / ours


def _bar(what, found, wanted, at_most=False):
    holds = found <= wanted if at_most else found >= wanted
    return {"bar": what, "found": found, "wanted": f"{'<=' if at_most else '>='} {wanted}", "holds": holds}


def _draw_chart(results, ceiling, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    results = timed(results)
    names = list(dict.fromkeys(name for result in results for name in result["milliseconds"]))
    figure, axes = pyplot.subplots(figsize=(10, 1 + 0.35 * len(results) * len(names)))
    for index, name in enumerate(names):
        at = [i + index / (len(names) + 1) for i, r in enumerate(results) if name in r["milliseconds"]]
        axes.barh(
            at,
            [r["gigabytes_per_second"][name] for r in results if name in r["milliseconds"]],
            0.8 / len(names),
            label=name,
        )
    axes.axvline(ceiling, color="black", linestyle="--", label="copy, same process")
    axes.set_yticks(range(len(results)), [f"{r['kernel']} {r['case']}" for r in results])
    axes.invert_yaxis()
    axes.set_xlabel("bytes that must move / time, GB/s")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


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
        sys.exit(
            f"no case is called {case}; there are: {', '.join(c.name for s in SUBJECTS.values() for c in s.cases)}"
        )
    return pairs


def main():
    """Measure what was asked for, print it, and leave a record, written after every case."""
    options = _parse()
    dtype, on_gpu, results = DTYPES[options.dtype], torch.cuda.is_available(), []
    record = {"machine": machine() | {"peers": {name: installed(name) for name in peers.PACKAGES}}, "results": results}
    if on_gpu:
        record["copy_gigabytes_per_second"] = ceiling = copy_bandwidth()
    name = record["machine"]["device"].replace(" ", "-").lower()
    path = options.json or RESULTS / f"throughput-{name}-{record['machine']['date']}.json"
    for subject, case in _chosen(options.kernel, options.case):
        print(f"{subject.name} {case.name} ...", file=sys.stderr, flush=True)
        named = {"kernel": subject.name, "case": case.name, "why": case.why, "dtype": options.dtype}
        results.append(named | _measured(subject, case, dtype, on_gpu, options))
        if on_gpu:
            record |= {"attention_choices": _attention_choices(), "bars": bars(results, ceiling)}
        write_json(path, record)
    if on_gpu:
        _print_gpu(results, ceiling)
        _draw_chart(results, ceiling, path.with_suffix(".png"))
    else:
        _print_cpu(results)
    print(f"\nrecord: {path}")
    sys.exit(1 if any("failed" in result for result in results) else 0)


def _measured(subject, case, dtype, on_gpu, options) -> dict:
    if not on_gpu:
        return measure_on_cpu(subject, case, dtype, options.chips)
    try:
        return measure_on_gpu(subject, case, dtype, options.rounds)
    except Exception as error:  # the other cases are worth their time
        return {"failed": f"{type(error).__name__}: {error}".splitlines()[0]}


if __name__ == "__main__":
    main()
