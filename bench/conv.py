"""Times every convolution of a network, forward and both gradients, in each way it can be run; names the best of each.

    python bench/conv.py                     # the reference network, 64 images of 128 px; on a CPU the small one
    python bench/conv.py --small             # the small network, 2 images of 64 px, anywhere
    python bench/conv.py --shapes 5 --json out.json      # rewritten after each shape

Hooks on the network itself find the shapes and how often each occurs. On a GPU, in bf16 and channels-last: cuDNN
(benchmark on), the compiler's templates (max-autotune; it has none for a weight gradient, nor for the data gradient of
a strided convolution), and for 1 x 1 a matrix product. On a CPU, in fp32: planes (NCHW) against channels-last, which
says nothing about a GPU. Rates are shown as shares of the matrix product's rate in the same process; the totals weight
each shape by how often it occurs in a step.
"""

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from clocks import interleaved, matmul_rate
from networks import NAMED, SIZES, one_line, their_unet
from record import command, load_average, machine, refuse, result_path, table, write_json

from duotone.data.refusal import Refused

PASSES = ("forward", "data gradient", "weight gradient")


@dataclass(frozen=True)
class Shape:
    """One convolution as the network meets it."""

    images: int
    channels: int
    height: int
    width: int
    out_channels: int
    kernel: int
    stride: int
    padding: int

    @property
    def out_size(self) -> tuple[int, int]:
        reach = 2 * self.padding - self.kernel
        return (self.height + reach) // self.stride + 1, (self.width + reach) // self.stride + 1

    @property
    def flops(self) -> int:
        """FLOPs of one pass; all three passes need the same number."""
        height, width = self.out_size
        return 2 * self.images * height * width * self.channels * self.out_channels * self.kernel**2

    def __str__(self) -> str:
        stride = f" / {self.stride}" if self.stride > 1 else ""
        return f"{self.channels} -> {self.out_channels}, {self.kernel} x {self.kernel}{stride}, {self.height} x {self.width}"


def shapes_of(network: str, size: int, batch: int) -> Counter:
    """The shape of every convolution in one forward pass, and how often it occurs; nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    seen: Counter = Counter()

    def note(layer, inputs, output):
        n, c, h, w = inputs[0].shape
        seen[Shape(n, c, h, w, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])] += 1

    with FakeTensorMode(), torch.no_grad():
        unet, arguments = ghost(network, size, batch)
        for layer in unet.modules():
            if isinstance(layer, torch.nn.Conv2d):
                layer.register_forward_hook(note)
        unet(*arguments)
    return seen


def ghost(network: str, size: int, batch: int) -> tuple:
    """The network and its inputs: ours, or diffusers' for Stable Diffusion's shape."""
    time_N = torch.zeros(batch)
    if network in NAMED:
        config = NAMED[network]
        tokens_NMD = torch.empty(batch, 77, config.context_width)
        return config.build(), (torch.empty(batch, config.in_channels, size, size), time_N, None, tokens_NMD)
    unet = their_unet(network, size)
    tokens_NMD = torch.empty(batch, 77, unet.config.cross_attention_dim)
    return unet, (torch.empty(batch, unet.config.in_channels, size, size), time_N, tokens_NMD)


# ---------------------------------------------------------------------------------------------------------- contenders


@dataclass
class Inputs:
    """One shape's tensors, in one layout."""

    shape: Shape
    x_NCHW: torch.Tensor
    weight: torch.Tensor
    gradient: torch.Tensor


def draw(shape: Shape, device: str, layout: torch.memory_format) -> Inputs:
    """Random tensors in a layout. Weights stay contiguous, as in training: converting them is part of the cost."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32

    def image(channels: int, *size: int) -> torch.Tensor:
        return torch.randn(shape.images, channels, *size, dtype=dtype, device=device).to(memory_format=layout)

    weight = torch.randn(shape.out_channels, shape.channels, shape.kernel, shape.kernel, dtype=dtype, device=device)
    x_NCHW = image(shape.channels, shape.height, shape.width)
    return Inputs(shape, x_NCHW, weight, image(shape.out_channels, *shape.out_size))


def library(inputs: Inputs) -> dict:
    """Each pass as PyTorch runs it: cuDNN on a GPU, oneDNN on a CPU."""
    shape, stride, padding = inputs.shape, [inputs.shape.stride] * 2, [inputs.shape.padding] * 2

    def backward(*wanted: bool):
        return lambda: torch.ops.aten.convolution_backward(
            inputs.gradient, inputs.x_NCHW, inputs.weight, None, stride, padding, [1, 1], False, [0, 0], 1, wanted
        )

    return {
        "forward": lambda: F.conv2d(inputs.x_NCHW, inputs.weight, None, shape.stride, shape.padding),
        "data gradient": backward(True, False, False),
        "weight gradient": backward(False, True, False),
    }


def templates(inputs: Inputs) -> dict:
    """The compiler's own convolution; the data gradient is a convolution too, with flipped and transposed weights."""
    shape = inputs.shape
    torch._dynamo.reset()
    torch._inductor.config.max_autotune_conv_backends = "TRITON"

    def forward():
        return F.conv2d(inputs.x_NCHW, inputs.weight, None, shape.stride, shape.padding)

    def data_gradient():
        turned = inputs.weight.flip(2, 3).transpose(0, 1)
        return F.conv2d(inputs.gradient, turned, None, 1, shape.kernel - 1 - shape.padding)

    calls = {"forward": forward} | ({"data gradient": data_gradient} if shape.stride == 1 else {})
    return {name: torch.compile(call, mode="max-autotune-no-cudagraphs") for name, call in calls.items()}


def products(inputs: Inputs) -> dict:
    """A 1 x 1 convolution over channels-last pixels is a matrix product."""
    x_PC, gradient_PO = (t.permute(0, 2, 3, 1).flatten(0, 2) for t in (inputs.x_NCHW, inputs.gradient))
    weight_OC = inputs.weight.flatten(1)
    return {
        "forward": lambda: x_PC @ weight_OC.T,
        "data gradient": lambda: gradient_PO @ weight_OC,
        "weight gradient": lambda: gradient_PO.T @ x_PC,
    }


def contenders(shape: Shape, device: str, with_templates: bool) -> tuple[dict, dict]:
    """Calls by pass and way, and the reason for each way that is missing."""
    last = draw(shape, device, torch.channels_last)
    if device == "cpu":
        planes = draw(shape, device, torch.contiguous_format)
        ways = {"planes": library(planes), "channels-last": library(last)}
    else:
        ways = {"cuDNN": library(last)}
    if shape.kernel == 1 and shape.stride == 1:
        ways["matrix product"] = products(last)
    absent = {}
    if device == "cuda" and with_templates:
        compiled = templates(last)
        for name, call in list(compiled.items()):
            try:
                call()
            except Exception as error:  # noqa: BLE001 - a shape without a working template is a finding, not a failure
                absent[f"templates, {name}"] = one_line(error)
                del compiled[name]
        ways["templates"] = compiled
    return {name: {way: calls[name] for way, calls in ways.items() if name in calls} for name in PASSES}, absent


# ------------------------------------------------------------------------------------------------------------- measuring


def measure(shape: Shape, number: int, device: str, rounds: int, with_templates: bool) -> dict:
    calls, absent = contenders(shape, device, with_templates)
    row = {"shape": asdict(shape), "name": str(shape), "number": number, "flops": shape.flops, "passes": {}}
    for name in PASSES:
        times = interleaved(calls[name], rounds, device)
        medians = {way: statistics.median(values) for way, values in times.items()}
        best = min(medians, key=medians.get)
        row["passes"][name] = {"milliseconds": medians, "best": best, "teraflops": shape.flops / medians[best] / 1e9}
    return row | ({"absent": absent} if absent else {})


def measure_all(found: Counter, device: str, asked: argparse.Namespace) -> Iterator[list[dict]]:
    """Yields all rows so far after each shape, heaviest first; templates are tried until their minutes are spent."""
    heaviest = sorted(found, key=lambda shape: -found[shape] * shape.flops)
    rows, began = [], time.monotonic()
    for shape in heaviest[: asked.shapes]:
        with_templates = time.monotonic() - began < 60 * asked.template_minutes
        rows.append(measure(shape, found[shape], device, asked.rounds, with_templates))
        print(f"{len(rows)} of {len(heaviest[: asked.shapes])}: {shape}", flush=True)
        yield rows


def totals(rows: list[dict], standard: str) -> dict[str, dict[str, float]]:
    """Milliseconds of a step's convolutions: with all run the standard way, and with each run its best way."""
    summed = {}
    for name in PASSES:
        passes = [(row["number"], row["passes"][name]) for row in rows]
        every = sum(number * one["milliseconds"][standard] for number, one in passes)
        best = sum(number * min(one["milliseconds"].values()) for number, one in passes)
        summed[name] = {standard: every, "best of each": best, "ratio": every / best}
    return summed


def choices(rows: list[dict]) -> list[dict]:
    """The table that an engine would look up: the fastest way for each shape and pass."""
    return [row["shape"] | {"pass": name, "choice": row["passes"][name]["best"]} for row in rows for name in PASSES]


def show(rows: list[dict], result: dict) -> str:
    lines = []
    for row in rows:
        for name, one in row["passes"].items():
            line = {"convolution": row["name"], "number": row["number"], "pass": name}
            ways = {way: one["milliseconds"].get(way) for way in result["ways"]}
            lines.append(line | ways | {"best": one["best"], "of matmul rate": one["teraflops"] / result["matmul_teraflops"]})  # fmt: skip
    summed = [{"pass, weighed": name} | total for name, total in result["totals"].items()]
    return table(lines) + "\n\n" + table(summed)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=[*NAMED, "sd15"], help="network whose convolutions are timed")
    parser.add_argument("--small", action="store_true", help="the small network, 2 images of 64 px")
    parser.add_argument("--batch", type=int, help="images per batch")
    parser.add_argument("--size", type=int, help="side in pixels")
    parser.add_argument("--shapes", type=int, help="time only this many shapes, the heaviest")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--template-minutes", type=float, default=6, help="how long the compiler may try templates")
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    return parser.parse_args()


def main() -> None:
    asked = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    small = asked.small or device == "cpu"
    network = asked.network or ("small" if small else "reference")
    size = SIZES[network] if asked.size is None else asked.size
    batch = (2 if small else 64) if asked.batch is None else asked.batch
    if min(size, batch, asked.rounds) < 1 or (asked.shapes is not None and asked.shapes < 1):
        refuse("--size, --batch, --rounds and --shapes must be at least 1")
    torch.backends.cudnn.benchmark = True
    try:
        found = shapes_of(network, size, batch)
    except Refused as refusal:
        refuse(str(refusal))
    path = result_path(asked.json, f"conv_{network}" if asked.network else "conv")
    about = {
        "machine": machine(),
        "command": command(),
        "network": network,
        "size": size,
        "batch": batch,
        "dtype": "bf16" if device == "cuda" else "fp32",
        "clock": "device" if device == "cuda" else "processor time",
        "convolutions": sum(found.values()),
        "matmul_teraflops": matmul_rate(device),
    }
    load = load_average()
    for rows in measure_all(found, device, asked):
        result = about | {"load_average": [load, load_average()]} | result_of(rows, device)
        write_json(path, result)
    print("\n" + show(rows, result))
    print(f"\nwritten: {path}")


def result_of(rows: list[dict], device: str) -> dict:
    every = (way for row in rows for one in row["passes"].values() for way in one["milliseconds"])
    summed = totals(rows, "cuDNN" if device == "cuda" else "planes")
    return {"ways": list(dict.fromkeys(every)), "totals": summed, "results": rows, "choices": choices(rows)}


if __name__ == "__main__":
    main()
