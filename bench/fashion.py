"""Fashion-MNIST at 28 px as a course for models: its shards, its classifier, and what samples are compared with.

python bench/fashion.py --scratch DIR    prepares the course; every bench that uses it does this itself if needed
"""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from record import refuse

from duotone.data.prepare.idx import PrepareIdx
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine.evaluate.classifier import ClassifierConfig, Judge, judge_of
from duotone.engine.evaluate.composition import Composition, composition
from duotone.engine.evaluate.distances import Statistics, frechet
from duotone.engine.evaluate.features import FeaturesConfig, RealFeatures, choose, real_features
from duotone.engine.evaluate.images import Splits, read_splits

FASHION = Path("/usr/share/datasets/fashion-mnist")
SAMPLES, CLASSES, SIDE = 1000, 10, 28
DATA = Shards(size=SIDE, channels=1, resize="none")
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class Course:
    """What every model is measured with, made before any is trained."""

    splits: Splits
    judge: Judge
    real: RealFeatures
    statistics: Statistics
    floor: float
    """Frechet distance from the training set of as many test images as there are samples."""
    labels_N: np.ndarray

    @classmethod
    def prepared(cls, scratch: Path, samples: int = SAMPLES) -> "Course":
        train, test = shards(scratch, "train"), shards(scratch, "t10k")
        splits = read_splits(replace(DATA, shards=train), test, 60_000)
        judge = judge_of(splits, ClassifierConfig(), scratch / "cache", CPU)
        real = real_features(choose(FeaturesConfig(), judge, CPU), splits, scratch / "cache")
        statistics = Statistics.of(real.train_ND)
        some_ND = real.held_out_ND[splits.held_out.spread()[:samples]]
        labels_N = np.arange(samples) * CLASSES // samples
        floor = frechet(Statistics.of(some_ND), statistics)
        found = {"splits": splits, "judge": judge, "real": real}
        return cls(**found, statistics=statistics, floor=floor, labels_N=labels_N)

    def measured(self, images_NHWC: np.ndarray) -> dict:
        accuracy, by_name = self.judge.shares(images_NHWC, self.labels_N)
        distance = frechet(Statistics.of(self.judge.features(images_NHWC).astype(np.float64)), self.statistics)
        return {
            "accuracy": accuracy.to_json(),
            "accuracy_by_class": {name: share.value for name, share in by_name.items()},
            "frechet": distance,
            "ratio_to_floor": distance / self.floor,
        }

    def composed(self, images_NHWC: np.ndarray) -> Composition:
        """The parts that the images' distance from the training set consists of."""
        return self._composition(self.judge.features(images_NHWC).astype(np.float64), self.labels_N)

    def composed_of_real(self) -> Composition:
        """The same for the test images that give the floor."""
        held_out = self.splits.held_out
        some = held_out.spread()[: len(self.labels_N)]
        return self._composition(self.real.held_out_ND[some], held_out.labels_N[some])

    def _composition(self, x_ND: np.ndarray, labels_N: np.ndarray) -> Composition:
        train = self.splits.train
        return composition(x_ND, labels_N, self.real.train_ND, train.labels_N, train.classes)


def files(split: str) -> tuple[Path, Path]:
    """Images and labels of `train` or `t10k`, as they are published."""
    return FASHION / f"{split}-images-idx3-ubyte.gz", FASHION / f"{split}-labels-idx1-ubyte.gz"


def shards(scratch: Path, split: str) -> Path:
    """The shards of `train` or `t10k`, prepared on first use."""
    out = scratch / "shards" / split
    if not out.exists():
        images, labels = files(split)
        PrepareIdx(images=images, labels=labels, names="fashion-mnist", out=out).run()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="folder for shards and the classifier")
    scratch = parser.parse_args().scratch
    try:
        course = Course.prepared(scratch)
    except Refused as refused:
        refuse(str(refused))
    for split, images in {"train": course.splits.train, "t10k": course.splits.held_out}.items():
        print(f"{len(images):,} images in {shards(scratch, split)}")
    print(f"classifier {course.judge.accuracy} in {course.judge.folder}; floor {course.floor:.3f}")


if __name__ == "__main__":
    main()
