"""A trained model against real images: samples drawn as the data asks, and everything that is measured of them.

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
from duotone.engine.evaluate.shares import Share
from duotone.engine.log import say
from duotone.engine.sample import sample

CHUNK = 64


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How samples are drawn and measured."""

    samples: int = 1000
    guidance: float = 2.0
    steps: int = 18
    sampler: str = "heun"
    seed: int = 1
    floor: int | None = None
    loss_images: int = 512
    loss_levels: int = 8
    features: FeaturesConfig = FeaturesConfig()
    classifier: ClassifierConfig = ClassifierConfig()
    cache: Path = Path(".")
    """Folder of trained classifiers and of features."""

    @property
    def real(self) -> int:
        """Real images of the floor."""
        return self.samples if self.floor is None else self.floor


@dataclass(frozen=True, kw_only=True)
class Against:
    """Distances from one reference: of the samples and, as the floor, of as many real images."""

    samples: Distance
    real: Distance


@dataclass(frozen=True, kw_only=True)
class Copies:
    """How many samples lie closer to a training image than one training image in a hundred does to another."""

    samples: Nearest
    real: float | None
    """The share of images that were not trained on; None where there are none."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that was measured."""

    settings: Settings
    forwards: float
    """Forward passes of each sample."""
    samples_NHWC: np.ndarray
    asked_for: Images
    """The training images whose conditions were asked for, in the order of the samples."""
    judge: Judge | None
    features: str
    width: int
    distances: dict[str, Against]
    """From "train", from "held_out" and, where the run has one beside it, from "validation"."""
    judged_by: str | None
    """What the classifier tells apart: "labels" or "attributes"."""
    asked_by: str
    """What the samples were asked by, as "labels" or "prompts"."""
    accuracy: Share | None
    by_name: dict[str, Share]
    losses: list[Loss]
    copies: dict[str, Copies]
    """By "pixels" and by "features"."""


def evaluate(model: Model, splits: Splits, settings: Settings) -> Evaluation:
    """Measures a model; what can be refused is, before the samples are drawn: one is drawn as a trial."""
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
    """The feature network and, where the data has names for it, the classifier: a network from elsewhere is looked for first."""
    elsewhere = settings.features.network in ("inception", "dinov2")
    network = chosen(settings, None, model) if elsewhere else None
    judge = judge_of(splits, settings.classifier, settings.cache, model.device) if has_names(splits) else None
    return network or chosen(settings, judge, model), judge


def chosen(settings: Settings, judge: Judge | None, model: Model) -> FeatureNetwork:
    """The feature network, refused where there are too few images for it."""
    network = choose(settings.features, judge, model.device)
    refuse_too_few(min(settings.samples, settings.real), network.width)
    return network


def has_names(splits: Splits) -> bool:
    """Whether there is something for a classifier to tell apart."""
    return splits.train.labels_N is not None or splits.train.attributes_NK is not None


# ------------------------------------------------------------------------------------------------------- refusals


def refuse_unfit(model: Model, splits: Splits, settings: Settings) -> None:
    """Settings, model and data that do not go together."""
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
                f"the {name} has {len(images)} images, and the floor is to have {settings.real}, as many as samples where "
                f"--floor says nothing; give --samples {len(images)} or less, more images with --test, or --floor"
            )
    if settings.loss_images and len(splits.held_out):
        conditions(model, splits.held_out.take(np.arange(1)))  # the losses are measured on these
    asked(model, splits.train.take(np.arange(1)), settings)  # what sample() refuses, it refuses for one image


def refuse_other_names(model: Model, images: Images) -> None:
    """A model asked for class 3 must mean what the data means by it."""
    for asked, name in (("labels", "classes"), ("attributes", "attributes")):
        ours, theirs = getattr(model.facts, name), getattr(images, name)
        if asked in takes(model) and ours != theirs:
            raise Refused(
                f"the model was trained on the {name} {listed(ours)}, and the data has {listed(theirs)}: "
                "give --data.shards the data it was trained on"
            )


def listed(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else "(none)"


# ------------------------------------------------------------------------------------------------------- sampling


def takes(model: Model) -> set[str]:
    """What it can be asked for."""
    return {conditioner.asked for conditioner in model.network.conditioners.values()} - {"temperatures"}


def asked_by(model: Model, judge: Judge | None) -> str:
    """What the model is asked by: what the classifier sees, where that is among it."""
    sees = "attributes" if judge is not None and judge.attributes else "labels"
    return sees if sees in takes(model) else " and ".join(sorted(takes(model)))


def takes_conditions(model: Model) -> bool:
    return bool(takes(model))


def conditions(model: Model, images: Images) -> dict:
    """Keyword arguments of sample() that ask for what these images show; raises Refused where the data does not say."""
    refuse_other_names(model, images)
    said = {
        "labels": None if images.labels_N is None else images.labels_N.tolist(),
        "prompts": images.captions,
        "attributes": None if images.attributes_NK is None else images.attributes_NK.tolist(),
    }
    spatial = [conditioner for conditioner in model.network.conditioners.values() if conditioner.spatial]
    said |= {conditioner.asked: conditioner.values_of(images.images_NHWC) for conditioner in spatial}
    for name in sorted(takes(model)):
        if said.get(name) is None:
            raise Refused(f"this model takes {name}, and the data has none: give --data.shards data with {name}")
    return {name: said[name] for name in takes(model)} or {"count": len(images)}


def as_asked(train: Images, count: int) -> Images:
    """`count` training images, every class with its share; where there are fewer, from the first again."""
    order_N = train.spread()
    return train.take(order_N[np.arange(count) % len(order_N)])


def drawn(model: Model, asked_for: Images, settings: Settings) -> np.ndarray:
    """One sample for each image, asked for as that one is."""
    say(f"drawing {len(asked_for):,} samples, guidance {settings.guidance}, {settings.steps} {settings.sampler} steps")
    # A chunk that memory does not hold is drawn again in halves: the count of steps may pass the total.
    steps, progress = itertools.count(1), Progress("sampling", math.ceil(len(asked_for) / CHUNK) * settings.steps)
    return asked(model, asked_for, settings, on_step=lambda *_: progress.at(next(steps)))


def asked(model: Model, asked_for: Images, settings: Settings, on_step: Callable | None = None) -> np.ndarray:
    return sample(
        model,
        **conditions(model, asked_for),
        guidance=settings.guidance if takes_conditions(model) else 1.0,
        steps=settings.steps,
        sampler=settings.sampler,
        seed=settings.seed,
        chunk=CHUNK,
        on_step=on_step,
    )


# ------------------------------------------------------------------------------------------------------- measures


def distances_of(made_ND: np.ndarray, real: RealFeatures, splits: Splits, floor: int) -> dict[str, Against]:
    """From every set of real images, with that of `floor` images of another set as the floor."""
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
    """Everything measured, and what a reader must know to repeat it; no path is among it."""
    settings = asdict(result.settings)
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
