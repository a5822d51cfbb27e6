"""The training step of one network three ways: diffusers eager, the same with fuse(), and compiled; same weights, same batch.

    python bench/train_step.py                          # the reference text network (a small one on a CPU)
    python bench/train_step.py --unet PATH              # a diffusers UNet folder of your own
    python bench/train_step.py --steps 200 --json out.json

Interleaved rounds, so that a busy machine disturbs all alike: ratios of medians, the loss curves on top of each other, what
fuse() replaced, and calls of PyTorch operators per step before and after. On a GPU also bf16, peak memory and MFU.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from harness import RESULTS, machine, write_json
from torch.utils.flop_counter import FlopCounterMode

from duotone.data.refusal import Refused
from duotone.engine import diffusers_folder
from duotone.engine.fuse import fuse
from duotone.engine.model.unet import UNetConfig

SMALL = UNetConfig(
    channels=(64, 128, 128),
    attention=("none", "cross", "cross"),
    heads=(4, 4, 4),
    blocks=(2, 2, 2),
    depth=(1, 1, 1),
    context_width=128,
)


def their_unet(path: Path | None, config: UNetConfig, size: int):
    """A diffusers UNet: the user's own, or our configuration built by their class."""
    import diffusers

    if path is None:
        theirs = diffusers_folder.to_config(config, size)
        return getattr(diffusers, theirs.pop("_class_name"))(**theirs)
    try:
        kind = json.loads((path / "config.json").read_text())["_class_name"]
        if kind not in (diffusers_folder.CONDITIONED, diffusers_folder.PLAIN):
            raise Refused(f"{path} holds a {kind}: --unet takes UNet2DModel or UNet2DConditionModel")
        return getattr(diffusers, kind).from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"{path} is no diffusers UNet folder ({str(error).splitlines()[0]})") from None


class Step:
    """One contender: its own copy of the weights, its own AdamW, one batch after another."""

    def __init__(self, unet, device: str, *, fused: bool = False, compiled: bool = False):
        self.unet = copy.deepcopy(unet).to(device)
        self.fused = fuse(self.unet, quiet=True) if fused else None
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-4, fused=device == "cuda")
        self.forward = torch.compile(self.unet) if compiled else self.unet
        self.device, self.milliseconds, self.losses = device, [], []

    def __call__(self, batch: dict) -> None:
        synchronise(self.device)
        began = time.perf_counter()
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            output = self.forward(batch["x"], batch["t"], **batch["condition"]).sample
        loss = (output.float() - batch["target"]).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.losses.append(loss.item())
        self.milliseconds.append(1e3 * (time.perf_counter() - began))


def synchronise(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def batches(unet, size: int, count: int, batch: int, device: str):
    """The same batches for every contender."""
    config, g = unet.config, torch.Generator().manual_seed(0)
    for _ in range(count):
        condition = {}
        if hasattr(config, "cross_attention_dim"):
            condition["encoder_hidden_states"] = torch.randn(batch, 77, config.cross_attention_dim, generator=g).to(
                device
            )
        elif config.num_class_embeds:
            condition["class_labels"] = torch.randint(config.num_class_embeds, (batch,), generator=g).to(device)
        yield {
            "x": torch.randn(batch, config.in_channels, size, size, generator=g).to(device),
            "t": torch.randint(1000, (batch,), generator=g).to(device),
            "target": torch.randn(batch, config.out_channels, size, size, generator=g).to(device),
            "condition": condition,
        }


def operators(step: Step, batch: dict) -> int:
    """Calls of PyTorch operators in one forward and backward."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step.unet(batch["x"], batch["t"], **batch["condition"]).sample.square().mean().backward()
    step.unet.zero_grad(set_to_none=True)
    return sum(row.count for row in profile.key_averages() if row.key.startswith(("aten::", "duotone::")))


def flops(step: Step, batch: dict) -> int:
    with FlopCounterMode(display=False) as counter:
        step.unet(batch["x"], batch["t"], **batch["condition"]).sample.square().mean().backward()
    step.unet.zero_grad(set_to_none=True)
    return counter.get_total_flops()


def measure(unet, size: int, batch: int, steps: int, device: str, compiled: bool) -> dict:
    contenders = {"diffusers eager": Step(unet, device), "fused eager": Step(unet, device, fused=True)}
    if compiled:
        contenders["diffusers compiled"] = Step(unet, device, compiled=True)
        contenders["fused compiled"] = Step(unet, device, fused=True, compiled=True)
    first = next(batches(unet, size, 1, batch, device))
    counts = {name: operators(step, first) for name, step in contenders.items() if "eager" in name}
    work = flops(contenders["diffusers eager"], first)
    for feed in batches(unet, size, steps + 2, batch, device):
        for step in contenders.values():
            step(feed)
    base = statistics.median(contenders["diffusers eager"].milliseconds[2:])
    rows = {}
    for name, step in contenders.items():
        ms = step.milliseconds[2:]
        rows[name] = {
            "milliseconds": statistics.median(ms),
            "quartiles": [round(q, 3) for q in statistics.quantiles(ms, n=4)],
            "images_per_second": 1e3 * batch / statistics.median(ms),
            "times_diffusers_eager": base / statistics.median(ms),
            "operators_per_step": counts.get(name),
            "teraflops": work / statistics.median(ms) / 1e9,
            "losses": [round(loss, 6) for loss in step.losses],
        }
    drift = max(abs(a - b) for a, b in zip(contenders["diffusers eager"].losses, contenders["fused eager"].losses))
    fused = asdict(contenders["fused eager"].fused)
    return {"contenders": rows, "largest_loss_difference": drift, "fused": fused, "flops_per_step": work}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--unet", type=Path, help="a diffusers UNet folder")
    parser.add_argument("--steps", type=int, help="steps of each contender (200 on a GPU, 20 on a CPU)")
    parser.add_argument("--batch", type=int, help="images per step")
    parser.add_argument("--size", type=int, help="side in pixels")
    parser.add_argument("--json", type=Path, help="where the result goes")
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    device = "cuda" if cuda else "cpu"
    size, batch = arguments.size or (128 if cuda else 32), arguments.batch or (64 if cuda else 4)
    steps = arguments.steps or (200 if cuda else 20)
    torch.manual_seed(0)
    try:
        unet = their_unet(arguments.unet, UNetConfig() if cuda else SMALL, size)
    except Refused as refusal:
        print(f"duotone: refused: {refusal}", file=sys.stderr)
        sys.exit(2)
    result = {
        "machine": machine(),
        "command": "python " + " ".join(["bench/train_step.py", *sys.argv[1:]]),
        "network": str(arguments.unet or ("reference" if cuda else "small text network")),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "size": size,
        "batch": batch,
        "steps": steps,
        **measure(unet, size, batch, steps, device, compiled=cuda),
    }
    if cuda:
        result["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    for name, row in result["contenders"].items():
        print(
            f"{name:20} {row['milliseconds']:9.1f} ms  {row['images_per_second']:8.1f} img/s  "
            f"{row['times_diffusers_eager']:5.2f}x  {row['operators_per_step'] or '':>6} operators  {row['teraflops']:7.2f} TFLOP/s"
        )
    print(f"largest difference between the loss curves: {result['largest_loss_difference']:.2e}")
    path = arguments.json or RESULTS / f"train_step-{device}-{result['machine']['date']}.json"
    write_json(path, result)
    print(f"written: {path}")


if __name__ == "__main__":
    main()
