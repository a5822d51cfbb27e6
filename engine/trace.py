"""The trace of a run, for comparing two runs: which samples each step saw, and a hash of every draw."""

import hashlib

from torch import Tensor

from duotone.data.batch import Batch
from duotone.engine.distributed import zero
from duotone.engine.run import Run


def fingerprints(batch: Batch, input_NCHW: Tensor) -> list[tuple[int, str, str]]:
    """Position, sample key and a hash of what the network saw, for each image."""
    rows = input_NCHW.detach().float().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    texts = batch.captions or [""] * len(batch.keys)
    return [
        (int(position), key, hashlib.sha256(row.tobytes() + text.encode()).hexdigest())
        for position, key, row, text in zip(batch.positions_N, batch.keys, rows, texts)
    ]


def trace(run: Run, mine: list[tuple[int, str, str]], loss: float) -> None:
    """Writes one row: the keys in the order of their positions, and one hash over every image's draws."""
    rows = sorted(zero.gathered(mine))
    digest = hashlib.sha256("".join(h for _, _, h in rows).encode()).hexdigest()
    run.log.trace({"images": run.images, "loss": loss, "keys": [key for _, key, _ in rows], "draws": digest})
