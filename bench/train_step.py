"""The training step of one network in several ways: diffusers eager, the same with fuse(), and on a GPU both compiled.

    python bench/train_step.py                          # the reference text network; on a CPU a small one
    python bench/train_step.py --unet sd15              # Stable Diffusion 1.5's shape
    python bench/train_step.py --unet PATH              # a diffusers UNet folder of your own
    python bench/train_step.py --steps 200 --json out.json

Same weights, same batches, same AdamW, in interleaved rounds; ratios are of medians. Counted before and after fuse():
operator calls and the bytes they move, changes of layout, graph breaks, and on a GPU kernel launches. Measured:
milliseconds, share of the matrix product's rate in this process, memory, and what each part of a step costs. The loss
curves go to a PNG beside the JSON. A CPU is timed in processor time; counts "as on a GPU" come from tensors without
storage.
"""

import argparse
import copy
import os
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from clocks import matmul_rate
from counters import counts_of, forward, forward_backward, ghost_counts, graphs, profiled, saved_bytes, summary
from networks import SIZES, batches, one_line, size_of, their_unet
from record import command, load_average, machine, refuse, result_path, table, write_json
from torch.utils.flop_counter import FlopCounterMode

from duotone.data.refusal import Refused
from duotone.engine.fuse import fuse

THEIRS, OURS = "diffusers eager", "fused eager"
WARM_UP, LEAST = 2, 5


@dataclass(frozen=True)
class Setting:
    """What one run measures."""

    network: str
    size: int
    batch: int
    steps: int
    minutes: float
    device: str
    compiled: bool


class Step:
    """One contender: its own copy of the weights, its own AdamW, one batch after another."""

    def __init__(self, unet, device: str, *, fused: bool = False, compiled: bool = False):
        self.unet = copy.deepcopy(unet).to(device)
        self.fused = fuse(self.unet, quiet=True) if fused else None
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=True)
        self.forward = torch.compile(self.unet) if compiled else self.unet
        self.device, self.milliseconds, self.losses, self.peak = device, [], [], 0
        # Processor time on a CPU: it does not run while another process has the core.
        self.clock = time.perf_counter if device == "cuda" else time.process_time

    def __call__(self, batch: dict) -> None:
        held = self.begin()
        loss = (forward(self.forward, batch).float() - batch["target"]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.milliseconds.append(1e3 * (self.clock() - self.began))
        self.end(held)

    def begin(self) -> int:
        held = 0
        if self.device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            held = torch.cuda.memory_allocated()
        self.began = self.clock()
        return held

    def end(self, held: int) -> None:
        if self.device == "cuda" and len(self.losses) > WARM_UP:
            self.peak = max(self.peak, torch.cuda.max_memory_allocated() - held)

    @property
    def timed(self) -> list[float]:
        return self.milliseconds[WARM_UP:]

    def gibibytes(self, batch: dict) -> float:
        """Weights, moments, and what a step adds: measured on a GPU; on a CPU, gradients and what autograd keeps."""
        own = 3 * sum(p.nbytes for p in self.unet.parameters())
        above = self.peak or saved_bytes(self.unet, lambda: forward(self.unet, batch)) + own // 3
        return (own + above) / 2**30


def contenders(unet, setting: Setting) -> dict[str, Step]:
    made = {THEIRS: Step(unet, setting.device), OURS: Step(unet, setting.device, fused=True)}
    if setting.compiled:
        made["diffusers compiled"] = Step(unet, setting.device, compiled=True)
        made["fused compiled"] = Step(unet, setting.device, fused=True, compiled=True)
    return made


def race(steps: dict[str, Step], config, setting: Setting) -> None:
    """Every contender takes every batch, until the minutes are spent; the order is reversed each time, so that none
    always follows the same other one."""
    for number, feed in enumerate(
        batches(config, setting.size, setting.steps + WARM_UP, setting.batch, setting.device)
    ):
        if number == WARM_UP:  # by now everything is compiled
            began = time.monotonic()
        if number >= WARM_UP + LEAST and time.monotonic() - began > 60 * setting.minutes:
            break
        for step in steps.values():
            step(feed)
        steps = dict(reversed(steps.items()))


def flops(unet, batch: dict) -> int:
    with FlopCounterMode(display=False) as counter:
        forward_backward(unet, batch)
    return counter.get_total_flops()


def measure(unet, setting: Setting) -> dict:
    steps = contenders(unet, setting)
    first = next(batches(unet.config, setting.size, 1, setting.batch, setting.device))
    work, rate = flops(steps[THEIRS].unet, first), matmul_rate(setting.device)
    began, loads = time.monotonic(), [load_average()]
    race(steps, unet.config, setting)
    loads.append(load_average())
    rows = {name: row_of(step, steps[THEIRS], setting, first, work, rate) for name, step in steps.items()}
    print(table([{"contender": name, "ms": row["milliseconds"]} for name, row in rows.items()]), flush=True)
    for name in (THEIRS, OURS):
        rows[name] |= counted(steps[name].unet, first, setting) | profiled(
            lambda step=steps[name]: step(first), setting.device
        )
    return {
        "contenders": rows,
        "largest_loss_difference": max(abs(a - b) for a, b in zip(steps[THEIRS].losses, steps[OURS].losses)),
        "fused": asdict(steps[OURS].fused),
        "flops_per_step": work,
        "matmul_teraflops": rate,
        "clock": "wall" if setting.device == "cuda" else "processor time",
        "race_seconds": round(time.monotonic() - began, 1),
        "load_average": loads,
    }


def counted(unet, batch: dict, setting: Setting) -> dict:
    return {"counted": summary(counts_of(unet, batch), setting.batch), "compiler": graphs(unet, batch)}


def row_of(step: Step, base: Step, setting: Setting, batch: dict, work: int, rate: float) -> dict:
    median = statistics.median(step.timed)
    return {
        "milliseconds": median,
        "quartiles": [round(q, 3) for q in statistics.quantiles(step.timed, n=4)] if len(step.timed) > 1 else [],
        "images_per_second": 1e3 * setting.batch / median,
        "times_diffusers_eager": statistics.median(base.timed) / median,
        "times_within_a_round": statistics.median(a / b for a, b in zip(base.timed, step.timed)),
        "share_of_matmul_rate": work / median / 1e9 / rate,
        "gibibytes": step.gibibytes(batch),
        "timed_steps": len(step.timed),
        "losses": [round(loss, 6) for loss in step.losses],
    }


# ------------------------------------------------------------------------------------------------------------- showing


def show(result: dict) -> str:
    rows, counts = [], []
    for name, row in result["contenders"].items():
        rows.append(
            {"contender": name, "ms": row["milliseconds"], "images/s": row["images_per_second"],
             "x diffusers eager": row["times_diffusers_eager"], "of matmul rate": row["share_of_matmul_rate"],
             "GiB": row["gibibytes"]} | row.get("shares", {})
        )  # fmt: skip
        if "counted" in row:
            launches = {"kernel launches": row["kernel_launches"]} if "kernel_launches" in row else {}
            counts.append({"counted here": name} | row["counted"] | row["compiler"] | launches)
    ghosts = [{"counted as on a GPU": name} | row for name, row in result["as_on_a_gpu"]["counts"].items()]
    drift = f"largest difference between the loss curves: {result['largest_loss_difference']:.2e}"
    return "\n\n".join([table(rows), table(counts), table(ghosts), drift])


def draw_losses(result: dict, path: Path) -> None:
    """The loss curves on top of each other, the first widest, so that a difference shows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for index, (name, row) in enumerate(result["contenders"].items()):
        axes.plot(row["losses"], label=name, linewidth=max(1.2, 6 - 3 * index))
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(
        f"{result['network']}, {result['size']} px: largest difference {result['largest_loss_difference']:.1e}"
    )
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


# ------------------------------------------------------------------------------------------------------------ settings


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", help="reference, small, tiny, sd15, or a diffusers UNet folder")
    parser.add_argument("--steps", type=int, default=200, help="timed steps of each contender")
    parser.add_argument(
        "--minutes", type=float, default=1.5, help="end earlier, but after at least 5 steps, when these are spent"
    )
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--size", type=int, help="side in pixels")
    parser.add_argument("--no-compile", action="store_true", help="on a GPU, leave torch.compile out")
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    return parser.parse_args()


def setting_of(asked: argparse.Namespace, unet, network: str) -> Setting:
    cuda = torch.cuda.is_available()
    large = sum(p.numel() for p in unet.parameters()) > 3e8
    setting = Setting(
        network=network,
        size=size_of(unet.config, asked.size, SIZES.get(network, 32)),
        batch=((8 if large else 64) if cuda else 2) if asked.batch is None else asked.batch,
        steps=asked.steps,
        minutes=asked.minutes,
        device="cuda" if cuda else "cpu",
        compiled=cuda and not asked.no_compile,
    )
    for name in ("size", "batch", "steps"):
        if getattr(setting, name) < 1:
            raise Refused(f"--{name} {getattr(setting, name)}: it must be at least 1")
    return setting


def refuse_too_large(unet, setting: Setting) -> None:
    """Each contender holds weights, gradients and two moments."""
    needed = (4 if setting.compiled else 2) * 16 * sum(p.numel() for p in unet.parameters()) / 2**30
    here = torch.cuda.mem_get_info()[0] if setting.device == "cuda" else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # fmt: skip
    if needed > here / 2**30:
        raise Refused(
            f"{setting.network} needs {needed:.0f} GiB before the first activation, {here / 2**30:.0f} are free: "
            "take a smaller --unet" + (", or --no-compile" if setting.compiled else "")
        )


def main() -> None:
    asked = parse()
    network = asked.unet or ("reference" if torch.cuda.is_available() else "small")
    torch.manual_seed(0)
    try:
        path = result_path(asked.json, f"train_step_{Path(asked.unet).name}" if asked.unet else "train_step")
        unet = their_unet(network, asked.size or SIZES.get(network, 32))
        setting = setting_of(asked, unet, network)
        refuse_too_large(unet, setting)
        result = measured(unet, setting)
    except Refused as refusal:
        refuse(str(refusal))
    print(show(result))
    write_json(path, result)
    written = [str(path)]
    try:
        draw_losses(result, path.with_suffix(".png"))
        written.append(str(path.with_suffix(".png")))
    except ImportError as error:
        print(f"no picture of the loss curves: {one_line(error)}", file=sys.stderr)
    print(f"\nwritten: {', '.join(written)}")


def measured(unet, setting: Setting) -> dict:
    """The record: what was run, its times and counts, and the reference network's counts as on a GPU."""
    plain = vars(setting) | {"parameters": sum(p.numel() for p in unet.parameters())}
    times = measure(unet, setting)
    ghost, size, batch = ("reference", 128, 64) if setting.network in ("small", "reference") else (setting.network, setting.size, setting.batch)  # fmt: skip
    subject = unet if ghost == setting.network else their_unet(ghost, size)
    as_on_a_gpu = {"network": ghost, "size": size, "batch": batch, "dtype": "bf16"}
    as_on_a_gpu["counts"] = ghost_counts(subject, size, batch)
    return {"machine": machine(), "command": command(), **plain, **times, "as_on_a_gpu": as_on_a_gpu}


if __name__ == "__main__":
    main()
