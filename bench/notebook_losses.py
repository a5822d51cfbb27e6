"""Losses of a run of recipes/mnist_concat.py by epoch, beside the ten that its notebook publishes.

python bench/notebook_losses.py runs/mnist_concat
python bench/notebook_losses.py runs/mnist_concat --json losses.json

After each epoch of MNIST, the notebook prints the mean loss of the last 100 batches. Here the mean, with its 95 %
interval, is over those of these batches that metrics.jsonl holds: every tenth, or all with --log.every 1. On other data
there is nothing to compare.
"""

import argparse
import json
import statistics
from pathlib import Path

from record import machine, refuse, refuse_unwritable, table, write_json

from duotone.data.refusal import Refused
from duotone.engine.recipe import Recipe
from duotone.engine.recipe_file import stored

PUBLISHED = (0.0525, 0.0460, 0.0433, 0.0423, 0.0412, 0.0407, 0.0404, 0.0394, 0.0391, 0.0390)
BATCHES = 100


def epochs(steps: list[dict], length: int, batch: int) -> list[dict]:
    """The loss at the end of each epoch of `length` images; `steps` are lines of metrics.jsonl."""
    rows = []
    for end in range(length, steps[-1]["images"] + 1, length):
        last = [step["loss"] for step in steps if end - BATCHES * batch < step["images"] <= end]
        losses = [loss for loss in last if loss is not None]  # metrics.jsonl holds null for one that is not finite
        if len(losses) > 1:
            half = 1.96 * statistics.stdev(losses) / len(losses) ** 0.5
            rows.append(
                {"epoch": end // length, "loss": statistics.mean(losses), "half_95": half, "batches": len(losses)}
            )
    return rows


def data_of(recipe: Recipe) -> dict:
    """The dataset.json of a run's shards, or an empty one if they are gone."""
    path = (recipe.data.shards or Path()) / "dataset.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def steps_of(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    if not lines:
        refuse(f"{path} holds no loss: give the folder of a run")
    return [json.loads(line) for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--epoch", type=int, help="images per epoch (default: as many as the run's shards hold)")
    parser.add_argument("--json", type=Path, help="also write the losses here")
    arguments = parser.parse_args()
    try:
        recipe = stored(arguments.run)
    except Refused as refusal:
        refuse(str(refusal))
    if arguments.json:
        refuse_unwritable(arguments.json)
    data, steps = data_of(recipe), steps_of(arguments.run)
    length = data.get("count", 0) if arguments.epoch is None else arguments.epoch
    if length < 1 and arguments.epoch is not None:
        refuse(f"--epoch {length}: an epoch has at least one image")
    if length < 1:
        refuse(f"the shards of {arguments.run} are no longer there: give --epoch, the number of images in one")
    rows = epochs(steps, length, recipe.batch_size)
    if not rows:
        refuse(
            f"{arguments.run} has trained on {steps[-1]['images']:,} images: no epoch of {length:,} ends with two logged batches"
        )
    name = data.get("about", {}).get("names")
    for row, published in zip(rows, PUBLISHED if name == "mnist" else ()):
        row["notebook"] = published
    print(table(rows))
    if arguments.json:
        said = {"command": "python bench/notebook_losses.py RUN", "data": name, "images_per_epoch": length}
        write_json(arguments.json, said | {"batch": recipe.batch_size, "machine": machine(), "epochs": rows})


if __name__ == "__main__":
    main()
