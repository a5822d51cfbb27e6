"""Checks that all ranks take part in the same run: on several machines, each has its own start command and its own disk."""

import hashlib
import socket
from pathlib import Path

import torch
from torch import nn

from duotone.data.dataset import Dataset
from duotone.data.refusal import Refused
from duotone.engine.distributed import zero
from duotone.engine.model.network import Network
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_json import flat, to_json, unlike
from duotone.engine.speed import Choice

OF_A_MACHINE = ("data.shards", "data.threads", "out", "start", "speed.threads")
"""Fields of a recipe that may differ between ranks: paths on a machine, and its number of threads."""


def check_recipe(recipe: Recipe, choice: Choice, ranks: zero.Ranks) -> None:
    """Raises Refused, on every rank, if one was started with other flags than rank 0 or on another kind of machine."""
    mine = flat(to_json(recipe))
    theirs, machine = zero.from_rank_0((mine, choice))
    other = unlike(theirs, mine, OF_A_MACHINE)
    if choice != machine:
        other.append(f"the machine's own choice: {machine} there, {choice} here")
    refuse_others(
        other, ranks, "is another run than rank 0's", "start all ranks by the same command, on identical machines"
    )


def check_data(data: Dataset, ranks: zero.Ranks) -> list[str]:
    """Raises Refused, on every rank, if one reads other data than rank 0; returns a line for each with another decoder or torch."""
    fingerprint, decoder, version = zero.from_rank_0((data.fingerprint, data.decoder, torch.__version__))
    other = [f"{data.paths[0].parent} holds other images or captions"] if data.fingerprint != fingerprint else []
    refuse_others(other, ranks, "reads other data than rank 0", "copy rank 0's shards there")
    mine = [f"decodes by {data.decoder}, rank 0 by {decoder}"] if data.decoder != decoder else []
    mine += [f"has torch {torch.__version__}, rank 0 {version}"] if torch.__version__ != version else []
    return [f"{where}: its numbers differ in their last digits" for where in named(mine, ranks)]


def check_frozen(network: Network, ranks: zero.Ranks) -> None:
    """Raises Refused, on every rank, if one has other frozen weights than rank 0: each rank uses those that it has loaded."""
    mine = weights_digest(network.frozen_modules) if ranks.count > 1 else ""
    other = ["its text encoder has other weights"] if mine != zero.from_rank_0(mine) else []
    refuse_others(other, ranks, "would encode text unlike rank 0", "copy rank 0's text encoder there")


def weights_digest(modules: list[nn.Module]) -> str:
    whole = hashlib.sha256()
    for module in modules:
        for tensor in module.state_dict().values():
            whole.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return whole.hexdigest()


def check_folder(folder: Path, ranks: zero.Ranks) -> list[str]:
    """A line for each rank that does not see the run's folder, which rank 0 has made: all ranks read its checkpoints to resume."""
    mine = [] if (folder / "recipe.json").exists() else [f"does not see {folder}"]
    return [f"{where}: the run can only be resumed where all machines share --out" for where in named(mine, ranks)]


def refuse_others(faults: list[str], ranks: zero.Ranks, says: str, remedy: str) -> None:
    found = named(["; ".join(faults)] if faults else [], ranks, says)
    if found:
        more = f", and {len(found) - 1} more ranks" if len(found) > 1 else ""
        raise Refused(f"{found[0]}{more}: {remedy}")


def named(mine: list[str], ranks: zero.Ranks, says: str = "") -> list[str]:
    """The lines of all ranks, each with the names of the rank and its machine, on every rank."""
    name = f"rank {ranks.rank} ({socket.gethostname()})"
    return zero.gathered([f"{name} {says} ({line})" if says else f"{name} {line}" for line in mine])
