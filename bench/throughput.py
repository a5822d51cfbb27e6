"""Kernels against every peer that is present and against the bytes they must move: table, JSON and, on a GPU, a PNG.

    python bench/throughput.py                          # everything
    python bench/throughput.py --kernel attention --case level_16_words --dtype bf16 --json out.json

On a GPU: medians and quartiles of interleaved rounds, the level-2 cache emptied before each, graphs replayed, beside the
copy bandwidth measured in the same process. Without one: what the compiler says of every launch, and the reference's time
on this CPU, marked as such; the GPU's columns say "not yet measured", and nothing is inferred.
"""

import argparse
import functools
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from harness import (
    CHIPS,
    RESULTS,
    copy_bandwidth,
    machine,
    recorded,
    resources,
    spread,
    table,
    time_interleaved,
    time_on_cpu,
    write_json,
)

from duotone.kernels import adamw_ema, attention, diffuse, group_norm_silu, guided_step, squared_norm

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MODULATION = ("add_NC", "scale_NC", "shift_NC")
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
    leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]

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
    for name in MODULATION if case.modulated else ():
        named[name] = torch.randn(case.shape[:2], dtype=dtype, device=device, requires_grad=True)
    return named


def _norm(function):
    def call(i):
        modulation = {name: i[name] for name in MODULATION if name in i}
        return function(i["x"], i["weight"], i["bias"], i["groups"], **modulation)

    return call


_in_turns = functools.partial(group_norm_silu.group_norm_silu, in_turns=True)


def _has_turns(case):
    """Maps larger than one program holds."""
    return case.timed and case.shape[2] * case.shape[3] >= 32 * 32


def _eager_norm(i):
    if "scale_NC" in i:
        return group_norm_silu.group_norm_silu_reference(
            *list(i.values())[:4], **{name: i[name] for name in MODULATION}
        )
    weight, bias = i["weight"].to(i["x"].dtype), i["bias"].to(i["x"].dtype)
    return F.silu(F.group_norm(i["x"], i["groups"], weight, bias))


def _apex_norm():
    group_norm_nhwc = importlib.import_module("apex.contrib.group_norm").cuda_group_norm_nhwc_one_pass
    return lambda i: group_norm_nhwc(i["x"], i["groups"], i["weight"], i["bias"], 1e-5, "silu")


def _liger_norm():
    function = importlib.import_module("liger_kernel.ops.group_norm").LigerGroupNormFunction
    return lambda i: F.silu(
        function.apply(i["x"], i["weight"], i["bias"], i["x"].shape[1], i["groups"], 1e-5).view_as(i["x"])
    )


def _channels_last_norm():
    function = importlib.import_module("gnNHWC.custom_gn").GN_NHWC_Func
    return lambda i: function.apply(i["x"], i["weight"], i["bias"], i["groups"], 1e-5, "silu")


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


def _backend(name):
    return lambda: lambda i: attention.BACKENDS[name](i["q"], i["k"], i["v"], i["mask"], None)


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


def _torch_update():
    """torch's own fused AdamW, foreach EMA and cast: three passes."""

    def call(i):
        master, gradient, average, square = i["state"]
        options = i["options"]
        torch._fused_adamw_(
            [master], [gradient.float()], [average], [square], [], [options["step"]],
            lr=options["lr"], beta1=0.9, beta2=0.999, weight_decay=0.01, eps=1e-8,
            amsgrad=False, maximize=False, grad_scale=None, found_inf=None,
        )  # fmt: skip
        for ema, decay in zip(i["emas"], options["ema_decays"]):
            torch._foreach_lerp_([ema], [master], 1 - decay)
        if options["weights_out"] is not None:
            options["weights_out"].copy_(master)
        return master

    return call


def _draw_gradient(case, dtype, device):
    return {"grad": torch.randn(case.parameters, device=device).to(case.grad)}


def _sum_of_squares(function):
    return lambda i: function(i["grad"])


def _one_image(case):
    if hasattr(case, "parameters"):
        return replace(case, parameters=min(case.parameters, 2**18))
    return replace(case, images=1) if hasattr(case, "images") else replace(case, shape=(1, *case.shape[1:]))


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
                "eager": lambda: _eager_norm,
                "compiled": lambda: torch.compile(_eager_norm),
                "apex": _apex_norm,
                "liger": _liger_norm,
                "channels-last-groupnorm": _channels_last_norm,
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
            {name: _backend(name) for name in attention.BACKENDS},
        ),
        Subject(
            diffuse,
            _draw_diffuse,
            lambda i: diffuse.diffuse(*i["arguments"], dtype=i["dtype"])[1],
            lambda i: diffuse.diffuse_reference(*i["arguments"], dtype=i["dtype"])[1],
            _diffuse_floor,
            _one_image,
            peers={"eager": lambda: lambda i: diffuse.diffuse_reference(*i["arguments"], dtype=i["dtype"])[1]},
        ),
        Subject(
            guided_step,
            _draw_guided,
            _guide(guided_step.guided_step),
            _guide(guided_step.guided_step_reference),
            _guided_floor,
            _one_image,
            peers={
                "eager": lambda: _guide(guided_step.guided_step_reference),
                "compiled": lambda: _guide(torch.compile(guided_step.guided_step_reference)),
            },
        ),
        Subject(
            adamw_ema,
            _draw_update,
            _update(adamw_ema.adamw_ema_),
            _update(adamw_ema.adamw_ema_reference_),
            _update_floor,
            _one_image,
            peers={"torch fused + EMA + cast": _torch_update},
        ),
        Subject(
            squared_norm,
            _draw_gradient,
            _sum_of_squares(squared_norm.squared_norm),
            _sum_of_squares(squared_norm.squared_norm_reference),
            lambda case, dtype: case.grad.itemsize * case.parameters,
            _one_image,
            peers={"torch vector_norm": lambda: lambda i: torch.linalg.vector_norm(i["grad"], dtype=torch.float32)},
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


def measure_on_gpu(subject, case, dtype, rounds):
    """Every contender on the same inputs; one that gives a wrong result is not timed."""
    inputs = subject.draw(case, dtype, "cuda")
    contenders, absent = {"ours": forward_backward(subject.ours, inputs)}, {}
    for name, factory in subject.peers.items():
        try:
            contenders[name] = forward_backward(factory(), inputs)
            contenders[name]()
        except Exception as error:
            contenders.pop(name, None)
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    _refuse_wrong(subject, case, dtype)
    times = {name: spread(values) for name, values in time_interleaved(contenders, rounds).items()}
    floor = subject.floor(case, dtype)
    achieved = {name: floor / time["median"] / 1e6 for name, time in times.items()}
    return {"milliseconds": times, "absent": absent, "floor_bytes": floor, "gigabytes_per_second": achieved}


def _refuse_wrong(subject, case, dtype):
    torch.manual_seed(0)
    small = subject.shrink(case)
    inputs = subject.draw(small, dtype, "cuda")
    clones = {name: _clone(value) for name, value in inputs.items()}
    mine, truth = (
        forward_backward(call, given)() for call, given in ((subject.ours, inputs), (subject.reference, clones))
    )
    for a, b in zip(mine, truth):
        error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-20)
        if not error < 0.02:
            sys.exit(f"{subject.name} {case.name}: differs from its definition by {error:.3g}; nothing was timed")


def _clone(value):
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
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
    for result in results:
        ours = result["milliseconds"]["ours"]["median"]
        for name, time in result["milliseconds"].items():
            share = result["gigabytes_per_second"][name] / ceiling
            row = {"kernel": result["kernel"], "case": result["case"], "who": name, "ms": time["median"]}
            rows.append(
                row | {"low": time["low"], "high": time["high"], "of ceiling": share, "ours is": time["median"] / ours}
            )
    print(table(rows))
    for result in results:
        for name, reason in result["absent"].items():
            print(f"{result['kernel']} {result['case']}: without {name}: {reason}")


def _draw_chart(results, ceiling, path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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
    """Measure what was asked for, print it, and leave a record."""
    options = _parse()
    dtype, on_gpu = DTYPES[options.dtype], torch.cuda.is_available()
    results = []
    for subject, case in _chosen(options.kernel, options.case):
        print(f"{subject.name} {case.name} ...", file=sys.stderr, flush=True)
        run = (
            measure_on_gpu(subject, case, dtype, options.rounds)
            if on_gpu
            else measure_on_cpu(subject, case, dtype, options.chips)
        )
        results.append({"kernel": subject.name, "case": case.name, "why": case.why, "dtype": options.dtype} | run)
    record = {"machine": machine(), "results": results}
    if on_gpu:
        record["copy_gigabytes_per_second"] = ceiling = copy_bandwidth()
        _print_gpu(results, ceiling)
    else:
        _print_cpu(results)
    name = record["machine"]["device"].replace(" ", "-").lower()
    path = options.json or RESULTS / f"throughput-{name}-{record['machine']['date']}.json"
    write_json(path, record)
    if on_gpu:
        _draw_chart(results, ceiling, path.with_suffix(".png"))
    print(f"\nrecord: {path}")


if __name__ == "__main__":
    main()
