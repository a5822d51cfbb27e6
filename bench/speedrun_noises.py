"""How much of a bench/speedrun.py record is due to its noise: the same weights, sampled from that noise and from others.

python bench/speedrun_noises.py --scratch DIR                                the last run's weights
python bench/speedrun_noises.py --scratch DIR --weights ema.safetensors      exported weights, from any machine
python bench/speedrun_noises.py --scratch DIR --guidance 1.5 --name calmer   less guidance, written to a separate result

Training images, drawn at random class by class, are measured as well: a perfect network would be at their distance.
"""

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
from fashion import SAMPLES, SIDE, Course
from record import machine, refuse, refuse_unwritable, write_json
from speedrun import RECORDS, SAMPLING, SEED, samples, with_sampling_range
from speedrun_sampling import described, print_row, trained_last

from duotone.data.refusal import Refused
from duotone.engine import artifact

DRAWS_OF_REAL = 20


def from_noises(course: Course, model: artifact.Model, count: int, guidance: float) -> list[dict]:
    """A row for each of `count` noises, the record's own first."""
    how, rows = replace(SAMPLING, guidance=guidance), []
    for seed in range(SEED, SEED + count):
        drawn = samples(with_sampling_range(model, how), course.labels_N, how, seed=seed)
        rows.append({"seed": seed} | described(course, drawn))
        print_row(rows[-1], f"noise {seed}")
    return rows


def of_real(course: Course) -> list[dict]:
    """A row for each draw of as many training images as there are samples."""
    train, rows = course.splits.train, []
    for seed in range(DRAWS_OF_REAL):
        places_N = of_each_class(train.labels_N, course.labels_N, seed)
        rows.append({"seed": seed} | described(course, train.images_NHWC[places_N]))
        print_row(rows[-1], f"training images {seed}")
    return rows


def of_each_class(labels_M: np.ndarray, wanted_N: np.ndarray, seed: int) -> np.ndarray:
    """N of M places without repetition, whose labels are those of `wanted_N`."""
    generator, places_N = np.random.default_rng(seed), np.empty(len(wanted_N), np.int64)
    for label, count in zip(*np.unique(wanted_N, return_counts=True)):
        places_N[wanted_N == label] = generator.choice(np.flatnonzero(labels_M == label), count, replace=False)
    return places_N


def summary(rows: list[dict]) -> dict:
    """Mean and standard deviation of the distances, and the mean share of images that are recognised."""
    distances = [row["frechet"] for row in rows]
    return {
        "frechet": statistics.mean(distances),
        "deviation": statistics.stdev(distances) if len(distances) > 1 else None,
        "recognised": statistics.mean(row["accuracy"]["value"] for row in rows),
    }


def loaded(path: Path) -> artifact.Model:
    """The model of some weights; raises Refused unless it draws what the course measures."""
    model = artifact.load(path, "cpu")
    if model.size != SIDE or not model.facts.classes or "label" not in model.network.conditioners:
        raise Refused(
            f"{path} does not draw garments of {SIDE} px by class: give weights that bench/speedrun.py trained"
        )
    return model


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder of bench/speedrun.py")
    parser.add_argument("--weights", type=Path, help="an exported ema.safetensors (default: the last run's)")
    parser.add_argument(
        "--noises", type=int, default=4, help="number of noises, including the record's own (default: 4)"
    )
    parser.add_argument(
        "--guidance", type=float, default=SAMPLING.guidance, help="guidance scale (default: the record's)"
    )
    parser.add_argument("--name", default="noises", help="name of the result (default: noises)")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.noises < 1:
        raise Refused(f"--noises {arguments.noises}: give at least 1")
    path = RECORDS / f"{arguments.name}.json"
    refuse_unwritable(path, "--name")
    model = loaded(arguments.weights or trained_last(arguments.scratch))
    course = Course.prepared(arguments.scratch)
    print(f"{SAMPLES} samples of the model of {model.images:,} images from each noise; floor {course.floor:.2f}")
    ours, real = from_noises(course, model, arguments.noises, arguments.guidance), of_real(course)
    command = f"python bench/speedrun_noises.py --scratch DIR --noises {arguments.noises}"
    command += " --weights ema.safetensors" if arguments.weights else ""
    command += f" --guidance {arguments.guidance:g} --name {arguments.name}"
    result = {
        "command": command,
        "sampling": str(replace(SAMPLING, guidance=arguments.guidance)),
        "images": model.images,
        "samples": SAMPLES,
        "floor": course.floor,
        "classifier_digest": course.judge.key,
        "machine": machine(),
        "summary": {"samples": summary(ours), "training images": summary(real)},
        "rows": {"samples": ours, "training images": real},
    }
    write_json(path, result)


if __name__ == "__main__":
    try:
        main()
    except Refused as refused:
        refuse(str(refused))
