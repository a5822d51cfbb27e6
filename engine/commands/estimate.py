"""`duotone estimate RECIPE`: parameters, arithmetic, memory and disk of a run, without running it."""

import os
from pathlib import Path

from duotone.engine.memory import USABLE

CARDS = {"24 GB": 24e9, "48 GB": 48e9, "80 GB": 80e9, "141 GB": 141e9}


def run(path: Path, flags: list[str]) -> None:
    """Prints the estimate of a recipe as run on this machine, and what would fit on common cards in bf16."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded for an estimate
    from duotone.engine import speed
    from duotone.engine.doctor.patient import Patient
    from duotone.engine.model.network import Network
    from duotone.engine.recipe_file import recipe_at

    recipe = recipe_at(path, flags, "duotone estimate RECIPE")
    patient = Patient(recipe)
    built, absent = patient.conditioners
    network = Network(patient.unet, list(built.values()))
    print(
        f"{recipe.name}: {recipe.images:,} images in {recipe.images // recipe.batch_size:,} steps of {recipe.batch_size}"
    )
    for kind, why in absent.items():
        print(f"  not counted     {kind}: {why}")
    for line in (
        *arithmetic(network, recipe),
        *memory(network, recipe, speed.choose(recipe.speed)),
        *fits(network, recipe),
    ):
        print(line)


def arithmetic(network, recipe) -> list[str]:
    from duotone.engine.memory import flops_per_image

    parameters = sum(p.numel() for p in network.parameters())
    forward = flops_per_image(network.unet, recipe.data.size)
    # A backward pass costs two forward passes, and recomputing the blocks for it costs one more.
    total = (4 if recipe.speed.gradient_checkpointing else 3) * forward * recipe.images
    disk = 4 * recipe.optimizer.state_elements(network) * recipe.checkpoint.keep
    return [
        f"  parameters      {parameters / 1e6:,.1f} M (UNet {sum(p.numel() for p in network.unet.parameters()) / 1e6:,.1f} M)",
        f"  arithmetic      {forward / 1e9:,.1f} GFLOP an image forward, {total / 1e15:,.1f} PFLOP for the run",
        f"                  {total / 4e14 / 3600:,.2f} hours of one card at 400 TFLOP/s",
        f"  checkpoints     {disk / 1e9:,.1f} GB for the {recipe.checkpoint.keep} kept, {4 * parameters / 1e9:,.2f} GB exported",
    ]


def memory(network, recipe, choice) -> list[str]:
    from duotone.engine.memory import estimate

    lines = [f"  memory a rank   at {choice.precision}, micro-batch x ranks x accumulation = {recipe.batch_size}"]
    for ranks in (1, 2, 4, 8):
        micro, rest = divmod(recipe.batch_size, ranks * (recipe.accumulation or 1))
        if micro and not rest:
            found = estimate(network, recipe, micro, choice, ranks)
            state, activations = found.state / 2**30, found.activations / 2**30
            lines.append(
                f"    {ranks} ranks x {micro:4}   {state:7.2f} GiB of state + {activations:7.2f} GiB of activations"
            )
    return lines


def fits(network, recipe) -> list[str]:
    """The largest micro-batch, a power of two, on common cards: one rank, bf16."""
    from duotone.engine.memory import estimate
    from duotone.engine.speed import Choice

    choice = Choice("cuda", "bf16", True)
    empty, one = (estimate(network, recipe, micro, choice, 1) for micro in (0, 1))
    lines = ["  one card, bf16"]
    for card, size in CARDS.items():
        room = int((USABLE * size - empty.state) // max(1, one.activations))
        largest = 1 << (room.bit_length() - 1) if room > 0 else 0
        lines.append(f"    {card:>7}       " + (f"micro-batch up to {largest}" if largest else "does not fit"))
    return lines
