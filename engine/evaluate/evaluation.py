"""Measures a trained model against real images: draws samples with the data's conditions and takes all measurements.

N samples, M real images, D features.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from duotone.data.refusal import Refused, at_least
from duotone.engine.artifact import Model
from duotone.engine.evaluate.classifier import ClassifierConfig, Judge, judge_of, wanted
from duotone.engine.evaluate.distances import Distance, distance, refuse_too_few, refuse_without_neighbours
from duotone.engine.evaluate.features import FeatureNetwork, FeaturesConfig, RealFeatures, choose, real_features
from duotone.engine.evaluate.images import Images, Splits
from duotone.engine.evaluate.loss_table import Loss, loss_table
from duotone.engine.evaluate.nearest import Nearest, nearest
from duotone.engine.evaluate.progress import Progress
from duotone.engine.evaluate.sample_settings import SampleSettings
from duotone.engine.evaluate.shares import Share
from duotone.engine.log import say
from duotone.engine.sample import sample

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Settings(SampleSettings):
    """How samples are drawn and measured."""

    samples: int = 1000
    floor: int | None = None
    loss_images: int = 512
    loss_levels: int = 8
    features: FeaturesConfig = FeaturesConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    cache: Path = Path(".")
    """Folder for trained classifiers and features."""

    @property
    def real(self) -> int:
        """Number of real images in the floor."""
        return self.samples if self.floor is None else self.floor


@dataclass(frozen=True, kw_only=True)
class Against:
    """Distances from one reference: of the samples, and of real images as the floor."""

    samples: Distance
    real: Distance


@dataclass(frozen=True, kw_only=True)
class Copies:
    """How many samples lie as close to a training image as the closest 1 % of training images do to another."""

    samples: Nearest
    real: float | None
    """The same share among images that were not trained on; None if there are none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Everything that was measured."""

    settings: Settings
    forwards: float
    """Forward passes per sample."""
    samples_NHWC: np.ndarray
    asked_for: Images
    """The training images whose conditions the samples were given, in the order of the samples."""
    judge: Judge | None
    features: str
    width: int
    distances: dict[str, Against]
    """Keys: "train", "held_out" and, if the run has a validation set beside a test set, "validation"."""
    judged_by: str | None
    """What the classifier predicts: "labels" or "attributes"."""
    asked_by: str
    """The conditions that the samples were given, such as "labels" or "prompts"."""
    accuracy: Share | None
    by_name: dict[str, Share]
    losses: list[Loss]
    copies: dict[str, Copies]
    """Keys: "pixels" and "features"."""


def evaluate(model: Model, splits: Splits, settings: Settings) -> Evaluation:
    """Measures a model. Raises Refused, if it must, before the samples are drawn; to find out, it draws one as a trial."""
    refuse_unfit(model, splits, settings)
    network, judge = judges(model, splits, settings)
    real = real_features(network, splits, settings.cache)
    asked_for = as_asked(splits.train, settings.samples)
    samples_NHWC = drawn(model, asked_for, settings)
    made_ND = network(samples_NHWC, "features of the samples")
    accuracy, by_name = (
        judge.shares(samples_NHWC, wanted(asked_for)) if judge and takes_conditions(model) else (None, {})
    )
    held_out = splits.held_out.drawn(settings.loss_images)
    return Evaluation(
        settings=settings,
        forwards=model.forwards,
        samples_NHWC=samples_NHWC,
        asked_for=asked_for,
        judge=judge,
        judged_by=None if judge is None else "attributes" if judge.attributes else "labels",
        asked_by=asked_by(model, judge),
        features=network.name,
        width=made_ND.shape[1],
        distances=distances_of(made_ND, real, splits, settings.real),
        accuracy=accuracy,
        by_name=by_name,
        losses=loss_table(model, held_out, levels=settings.loss_levels, seed=settings.seed) if len(held_out) else [],
        copies=copies_of(samples_NHWC, made_ND, splits, real),
    )


def judges(model: Model, splits: Splits, settings: Settings) -> tuple[FeatureNetwork, Judge | None]:
    """The feature network and, if the data has names for it, the classifier. A pretrained network is looked for before training."""
    elsewhere = settings.features.network in ("inception", "dinov2")
    network = chosen(settings, None, model) if elsewhere else None
    judge = judge_of(splits, settings.classifier, settings.cache, model.device) if has_names(splits) else None
    return network or chosen(settings, judge, model), judge


def chosen(settings: Settings, judge: Judge | None, model: Model) -> FeatureNetwork:
    """The feature network; raises Refused if there are too few images for it."""
    network = choose(settings.features, judge, model.device)
    refuse_too_few(min(settings.samples, settings.real), network.width)
    return network


def has_names(splits: Splits) -> bool:
    """Whether the training images have labels or attributes for a classifier."""
    return splits.train.labels_N is not None or splits.train.attributes_NK is not None


# ------------------------------------------------------------------------------------------------------- refusals


def refuse_unfit(model: Model, splits: Splits, settings: Settings) -> None:
    """Raises Refused if settings, model and data do not fit together."""
    if settings.loss_images < 0:
        raise Refused(f"loss_images = {settings.loss_images}: it must not be negative (0 = no table of losses)")
    if settings.real < 2:
        raise Refused(f"floor = {settings.real}: give at least 2 real images")
    refuse_without_neighbours(min(settings.samples, settings.real))
    at_least("loss_levels", settings.loss_levels, 1)
    settings.classifier.check()
    if has_names(splits) and settings.features.network in ("auto", "classifier"):
        refuse_too_few(min(settings.samples, settings.real), settings.classifier.width)
    for part, images in splits.parts.items():
        name = {"train": "training set", "held_out": "held-out set"}.get(part, f"{part} set")
        if len(images) < settings.real:
            raise Refused(
                f"the {name} has {len(images)} images, but the floor needs {settings.real}, which is --floor, or --samples "
                f"without it; give --samples {len(images)} or less, more images with --test, or --floor"
            )
    if settings.loss_images and len(splits.held_out):
        conditions(model, splits.held_out.take(np.arange(1)))  # the losses are measured on held-out images
    asked(model, splits.train.take(np.arange(1)), settings)  # whatever sample() refuses, it also refuses for one image


def refuse_other_names(model: Model, images: Images) -> None:
    """Raises Refused unless a class or attribute has the same name at the same place in the model and the data."""
    for asked, name in (("labels", "classes"), ("attributes", "attributes")):
        ours, theirs = getattr(model.facts, name), getattr(images, name)
        if asked in takes(model) and ours != theirs:
            raise Refused(
                f"the model was trained on the {name} {listed(ours)}, but the data has {listed(theirs)}: "
                "give --data.shards the data it was trained on"
            )


def listed(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else "(none)"


# ------------------------------------------------------------------------------------------------------- sampling


def takes(model: Model) -> set[str]:
    """The keyword arguments of sample() by which the model takes conditions, except temperatures."""
    return {conditioner.keyword for conditioner in model.network.conditioners.values()} - {"temperatures"}


def asked_by(model: Model, judge: Judge | None) -> str:
    """The conditions that the samples are given; only what the classifier sees, if that is among them."""
    sees = "attributes" if judge is not None and judge.attributes else "labels"
    return sees if sees in takes(model) else " and ".join(sorted(takes(model)))


def takes_conditions(model: Model) -> bool:
    return bool(takes(model))


def conditions(model: Model, images: Images) -> dict:
    """Keyword arguments of sample() with these images' conditions; raises Refused if the data lacks a condition."""
    refuse_other_names(model, images)
    said = {
        "labels": None if images.labels_N is None else images.labels_N.tolist(),
        "prompts": images.captions,
        "attributes": None if images.attributes_NK is None else images.attributes_NK.tolist(),
    }
    spatial = [conditioner for conditioner in model.network.conditioners.values() if conditioner.spatial]
    said |= {conditioner.keyword: conditioner.values_of(images.images_NHWC) for conditioner in spatial}
    for name in sorted(takes(model)):
        if said.get(name) is None:
            raise Refused(f"this model takes {name}, but the data has none: give --data.shards data with {name}")
    return {name: said[name] for name in takes(model)} or {"count": len(images)}


def as_asked(train: Images, count: int) -> Images:
    """`count` training images in which every class keeps its share; if there are fewer, they repeat from the first."""
    order_N = train.spread()
    return train.take(order_N[np.arange(count) % len(order_N)])


def drawn(model: Model, asked_for: Images, settings: Settings) -> np.ndarray:
    """One sample for each image, with the conditions of that image."""
    say(f"drawing {len(asked_for):,} samples, guidance {settings.guidance}, {settings.steps} {settings.sampler} steps")
    # A chunk that does not fit in memory is drawn again in halves, so the count of steps may exceed the total.
    steps, progress = itertools.count(1), Progress("sampling", math.ceil(len(asked_for) / CHUNK) * settings.steps)
    return asked(model, asked_for, settings, on_step=lambda *_: progress.at(next(steps)))


def asked(model: Model, asked_for: Images, settings: Settings, on_step: Callable | None = None) -> np.ndarray:
    return sample(
        model,
        **conditions(model, asked_for),
        **settings.for_sample(),
        chunk=CHUNK,
        on_step=on_step,
    )


# ------------------------------------------------------------------------------------------------------- measures


def distances_of(made_ND: np.ndarray, real: RealFeatures, splits: Splits, floor: int) -> dict[str, Against]:
    """Distances from every set of real images, each with that of `floor` images of another set as the floor."""
    count = min(len(made_ND), floor)
    some_ND = {name: some(real.parts[name], floor, images) for name, images in splits.parts.items()}
    return {
        name: Against(
            samples=distance(made_ND, real.parts[name], some_ND[name], count),
            real=distance(some_ND["held_out" if name == "train" else "train"], real.parts[name], some_ND[name], count),
        )
        for name in splits.parts
    }


def some(features_MD: np.ndarray, count: int, images: Images) -> np.ndarray:
    """Features of `count` images in which every class keeps its share."""
    return features_MD[images.spread()[:count]]


def copies_of(samples_NHWC: np.ndarray, made_ND: np.ndarray, splits: Splits, real: RealFeatures) -> dict[str, Copies]:
    say(f"looking for the nearest of {len(splits.seen):,} training images")
    n = len(made_ND)
    spaces = {
        "pixels": (samples_NHWC, splits.seen.images_NHWC, splits.held_out.images_NHWC[:n]),
        "features": (made_ND, real.seen_ND, real.held_out_ND[:n]),
    }
    return {
        name: Copies(samples=nearest(made, seen), real=nearest(held_out, seen).closer if splits.is_apart else None)
        for name, (made, seen, held_out) in spaces.items()
    }


# ------------------------------------------------------------------------------------------------------- as JSON


def to_json(result: Evaluation, splits: Splits, model: Model) -> dict:
    """Everything measured, and all settings that are needed to repeat it, without any path."""
    settings = asdict(result.settings) | result.settings.to_json()
    settings.pop("cache")
    settings["features"] = {"network": settings["features"]["network"]}
    return {
        "run": model.recipe.name,
        "trained_images": model.images,
        "settings": settings,
        "forwards_per_sample": result.forwards,
        "data": {
            **{name: len(images) for name, images in splits.parts.items()},
            "held_out_is": splits.held_out_is,
            "searched_for_copies": len(splits.seen),
            "training_images": splits.seen.there_are,
            "fingerprint": splits.fingerprint,
        },
        "features": {"name": result.features, "width": result.width},
        "classifier": None if result.judge is None else result.judge.accuracy.to_json(),
        "distances": {name: asdict(against) for name, against in result.distances.items()},
        "accuracy_of": result.judged_by,
        "asked_by": result.asked_by,
        "accuracy": None if result.accuracy is None else result.accuracy.to_json(),
        "accuracy_by_name": {name: share.to_json() for name, share in result.by_name.items()},
        "losses": [asdict(loss) for loss in result.losses],
        "nearest": {name: copies_json(copies) for name, copies in result.copies.items()},
    }


def copies_json(copies: Copies) -> dict:
    found = copies.samples
    return {
        "closer": found.closer,
        "closer_real": copies.real,
        "threshold": found.threshold,
        "smallest": float(found.distances_N.min()),
        "median": float(np.median(found.distances_N)),
    }
