"""What each switch of engine/speed.py costs or saves: our own network's training step with one switch changed at a time.

    python bench/switches.py                 # the reference network; on a CPU the small one
    python bench/switches.py --rounds 5 --json out.json

Rounds are interleaved, on the same weights and batches. Ratios are of medians, relative to the settings that a run
chooses on this device by itself; these are timed anew beside each switch. Memory is what autograd keeps between the
passes.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from counters import saved_bytes
from networks import NAMED, SIZES
from record import NOT_MEASURED, command, load_average, machine, refuse, result_path, table, write_json

from duotone.engine.model.unet import UNet
from duotone.engine.speed import Choice, Speed, choose, make_ready, set_up


@dataclass(frozen=True)
class Setting:
    """One way to run a step; `why_not` says why this device cannot run it."""

    name: str
    choice: Choice
    switches: Speed = Speed()
    why_not: str | None = None


def settings(usual: Choice) -> list[Setting]:
    """The usual choice first, then one switch changed at a time."""
    other = "fp32" if usual.precision == "bf16" else "bf16"
    cuda = usual.device == "cuda"
    minutes = None if cuda else "compilation takes minutes on a CPU"
    no_gpu = None if cuda else "no CUDA device"
    return [
        Setting("as chosen", usual),
        Setting(f"speed.precision = {other}", replace(usual, precision=other)),
        Setting(f"speed.compile = {not usual.compile}", replace(usual, compile=not usual.compile), why_not=minutes),
        Setting("speed.cuda_graphs = True", usual, Speed(cuda_graphs=True), why_not=no_gpu),
        Setting("speed.norms_in_turns = True", usual, Speed(norms_in_turns=True), why_not=no_gpu),
        Setting("speed.norms_join_skips = True", usual, Speed(norms_join_skips=True), why_not=no_gpu),
        Setting("speed.padded_ends = True", usual, Speed(padded_ends=True)),
        Setting("speed.gradient_checkpointing = True", usual, Speed(gradient_checkpointing=True)),
        Setting("speed.autotune = True", usual, Speed(autotune=True), why_not=minutes),
    ]


class Step:
    """Forward, backward and AdamW, without fp32 master weights: what a switch changes is in the passes."""

    def __init__(self, unet: UNet, setting: Setting):
        self.unet = copy.deepcopy(unet).to(setting.choice.device, setting.choice.dtype)
        make_ready(self.unet, setting.switches, setting.choice)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=True)
        self.milliseconds: list[float] = []
        self.clock = time.perf_counter if setting.choice.device == "cuda" else time.process_time

    def loss(self, batch: dict) -> torch.Tensor:
        inputs = (batch["x"].to(self.unet.conv_in.weight.dtype), batch["time"], None)
        output = self.unet(*inputs, batch["tokens"].to(self.unet.conv_in.weight.dtype))
        return (output.float() - batch["target"]).square().mean()

    def __call__(self, batch: dict) -> None:
        began = self.clock()
        torch.compiler.cudagraph_mark_step_begin()
        self.loss(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if batch["x"].is_cuda:
            torch.cuda.synchronize()
        self.milliseconds.append(1e3 * (self.clock() - began))

    def saved_mebibytes(self, batch: dict) -> float:
        return saved_bytes(self.unet, lambda: self.loss(batch)) / 2**20


def drawn(config, size: int, images: int, device: str) -> dict:
    g = torch.Generator().manual_seed(0)
    x_NCHW, target_NCHW = (
        torch.randn(images, config.in_channels, size, size, generator=g).to(device) for _ in range(2)
    )
    tokens_NMD = torch.randn(images, 77, config.context_width, generator=g).to(device)
    return {
        "x": x_NCHW,
        "target": target_NCHW,
        "tokens": tokens_NMD,
        "time": torch.rand(images, generator=g).to(device),
    }


def measure(network: str, images: int, rounds: int, usual: Choice) -> Iterator[list[dict]]:
    """Yields all rows so far after each switch; the usual choice takes a step beside every step of the changed one."""
    torch.manual_seed(0)
    unet, batch = NAMED[network].build(), drawn(NAMED[network], SIZES[network], images, usual.device)
    chosen, *moved = settings(usual)
    base, rows = Step(unet, chosen), []
    for setting in moved:
        if setting.why_not:
            rows.append({"switch": setting.name, "milliseconds": None, "why": f"{NOT_MEASURED}: {setting.why_not}"})
        else:
            step, base.milliseconds = Step(unet, setting), []
            for _ in range(rounds + 1):
                base(batch)
                step(batch)
            rows.append(row_of(setting, step, base, batch))
        yield [row_of(chosen, base, base, batch), *rows]


def row_of(setting: Setting, step: Step, base: Step, batch: dict) -> dict:
    median, usual = (statistics.median(one.milliseconds[1:]) for one in (step, base))
    return {"switch": setting.name, "milliseconds": median, "times_as_chosen": median / usual,
            "saved_mebibytes": step.saved_mebibytes(batch)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=list(NAMED), help="our network of this shape")
    parser.add_argument("--batch", type=int, help="images per batch (default: 32 on a GPU, 2 on a CPU)")
    parser.add_argument("--rounds", type=int, default=10, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    asked = parser.parse_args()
    usual = choose(Speed())
    network = asked.network or ("reference" if usual.device == "cuda" else "small")
    images = (32 if usual.device == "cuda" else 2) if asked.batch is None else asked.batch
    if min(images, asked.rounds) < 1:
        refuse("--batch and --rounds must be at least 1")
    set_up(Speed(), usual)  # as a run does: cuDNN's search, TF32
    path, load = result_path(asked.json, f"switches_{network}" if asked.network else "switches"), load_average()
    about = {"machine": machine(), "command": command(), "network": network, "size": SIZES[network], "batch": images,
             "as_chosen": vars(usual), "clock": "wall" if usual.device == "cuda" else "processor time"}  # fmt: skip
    for rows in measure(network, images, asked.rounds, usual):
        write_json(path, about | {"load_average": [load, load_average()], "results": rows})
    print(
        table(
            [
                {"switch": "", "milliseconds": None, "times_as_chosen": None, "saved_mebibytes": None, "why": ""} | row
                for row in rows
            ]
        )
    )
    print(f"written: {path}")


if __name__ == "__main__":
    main()
