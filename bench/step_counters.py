"""What one compiled training step consists of, without a GPU: launches of our kernels, graph breaks, recompiles.

Launches are counted on the reference text network (109.5 M parameters, 128 px, batch 64) without storage; breaks and
recompiles come from the record of a real run of six steps under DeepSpeed, whose blocks are traced with fullgraph, both
passes (aot_eager).
"""

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch
from harness import recorded

from duotone.engine.model.unet import UNetConfig
from duotone.kernels.adamw_ema import adamw_ema_
from duotone.kernels.squared_norm import squared_norm

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 6, 16


def launches_of_a_step(images: int = 64, size: int = 128) -> dict[str, int]:
    """Launches of each of our kernels' programs in forward, backward and update of the reference network."""
    with recorded() as seen, torch.device("meta"):
        unet = UNetConfig().build().to(torch.bfloat16)
        x_NCHW = torch.empty(images, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        tokens_NMD = torch.empty(images, 77, unet.config.context_width, dtype=torch.bfloat16)
        mask_NM = torch.ones(images, 77, dtype=torch.bool)
        unet(x_NCHW, torch.empty(images), None, tokens_NMD, mask_NM).sum().backward()
        for shard in (0, 1):  # decayed parameters and the others
            update(sum(p.numel() for p in unet.parameters() if (p.ndim > 1) == (shard == 0)))
    return dict(Counter(launch.kernel.fn.__module__.split(".")[-1] + "." + launch.name for launch in seen))


def update(parameters: int) -> None:
    """One shard's two launches."""
    flat = [torch.empty(parameters) for _ in range(4)]
    grad_P, weights_P = (torch.empty(parameters, dtype=torch.bfloat16) for _ in range(2))
    squared_norm(grad_P)
    options = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": 1, "ema_decays": (0.999,)}
    adamw_ema_(flat[0], grad_P, flat[1], flat[2], flat[3:], **options, weights_out=weights_P)


def compiled_run(stage: int) -> dict[str, int]:
    """Graph breaks, and recompiles after step 2, of a short compiled run at a ZeRO stage."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = [
            "--out",
            str(out),
            "--images",
            str(STEPS * BATCH),
            "--zero.stage",
            str(stage),
            "--batch-size",
            str(BATCH),
        ]
        flags += ["--speed.compile", "True", "--speed.backend", "aot_eager", "--optimizer.schedule", "constant"]
        flags += ["--preview.rows", "1", "--preview.columns", "1", "--preview.steps", "1"]
        command = [sys.executable, "recipes/coco_clip.py", *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"the compiled run failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        record = json.loads((out / "record.json").read_text())
    return {name: record[name] for name in ("graph_breaks", "recompiles_after_step_2")}


def counters() -> dict:
    """All counters of this file."""
    runs = {f"ZeRO {stage}": compiled_run(stage) for stage in (1, 2)}
    return {"launches": launches_of_a_step(), "runs": runs}


def violations(found: dict) -> list[str]:
    """A line for every graph break and every recompile after step 2, of which a compiled run must have none."""
    return [
        f"{stage}: {name.replace('_', ' ')} = {count}"
        for stage, run in found["runs"].items()
        for name, count in run.items()
        if count
    ]


def show(found: dict) -> str:
    total = sum(found["launches"].values())
    lines = [f"compiled step: {total} launches of our kernels in the reference network's step"]
    lines += [f"  {count:5}  {name}" for name, count in sorted(found["launches"].items())]
    for stage, run in found["runs"].items():
        lines.append(f"  {stage}: " + ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in run.items()))
    return "\n".join(lines)
