"""A small classifier of the data set itself: it judges samples, and its penultimate layer is a feature network.

N images of H x W pixels and C channels, D features, K classes or attributes.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from duotone.data.batch import to_plus_minus_one
from duotone.data.refusal import Refused, at_least, first_line
from duotone.data.whole_file import draft_of, write_json
from duotone.engine.checkpoint import digest
from duotone.engine.evaluate.images import Images, Splits
from duotone.engine.evaluate.progress import Progress
from duotone.engine.evaluate.shares import Share
from duotone.engine.log import say

CHUNK = 512
WEIGHTS = "classifier.safetensors"
VERSION = 2  # of network and training; part of the cache key


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """How the classifier is trained; the same settings and data give the same classifier."""

    width: int = 128
    """Features of its penultimate layer."""
    epochs: int = 3
    """Passes over the training set."""
    batch_size: int = 128
    """Images per step."""
    lr: float = 3e-3
    """Highest learning rate; the rate rises over the first fifth of the steps, then falls to 0."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    flip: bool = True
    """Mirror images at random; turn it off for digits and letters."""
    shift: int = 2
    """Shift images by up to this many pixels."""
    seed: int = 0
    """Seed of the weights, the order of images and the augmentation."""

    def check(self) -> None:
        for name in ("width", "epochs", "batch_size"):
            at_least(f"classifier.{name}", getattr(self, name), 1)
        if self.lr <= 0 or self.shift < 0:
            raise Refused(f"classifier.lr = {self.lr}, classifier.shift = {self.shift}: give lr > 0 and shift >= 0")


class Classifier(nn.Module):
    """Convolutions with max-pooling down to 3 x 3, then D features, then K logits."""

    def __init__(self, channels: int, side: int, width: int, outputs: int):
        super().__init__()
        halvings = max(1, round(np.log2(side / 3.5)))
        widths = [channels, *(min(32 * 2**i, 128) for i in range(halvings))]
        self.stages = nn.Sequential(*(stage(i, o) for i, o in zip(widths, widths[1:])))
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.features = nn.Linear(9 * widths[-1], width)
        self.head = nn.Linear(width, outputs)

    def embed(self, x_NCHW: Tensor) -> Tensor:
        """The penultimate layer, features_ND."""
        return F.relu(self.features(self.pool(self.stages(x_NCHW)).flatten(1)))

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.head(self.embed(x_NCHW))


def stage(width: int, out_width: int) -> nn.Sequential:
    """Halves the sides; the norm comes after the pooling, where it costs a quarter as much."""
    convolution = nn.Conv2d(width, out_width, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.MaxPool2d(2), nn.BatchNorm2d(out_width), nn.ReLU())


@dataclass(frozen=True, kw_only=True)
class Judge:
    """A trained classifier, and its accuracy on real images that it has not seen."""

    network: Classifier
    names: tuple[str, ...]
    """Names of the classes, or of the attributes."""
    attributes: bool
    """Whether the names are attributes, of which an image may have several."""
    accuracy: Share
    by_name: dict[str, Share]
    key: str
    """Digest of its weights."""
    folder: Path
    """Where it is stored."""

    def logits(self, images_NHWC: np.ndarray) -> np.ndarray:
        return run(self.network, images_NHWC)

    def features(self, images_NHWC: np.ndarray) -> np.ndarray:
        return run(self.network.embed, images_NHWC)

    def shares(self, images_NHWC: np.ndarray, wanted: np.ndarray) -> tuple[Share, dict[str, Share]]:
        """How often it sees what was wanted, labels_N or attributes_NK: overall, and by name."""
        return shares(self.logits(images_NHWC), wanted, self.names)


@torch.inference_mode()
def run(function: Callable, images_NHWC: np.ndarray) -> np.ndarray:
    """The output of a classifier, or of its `embed`, for the images, computed a chunk at a time."""
    network = getattr(function, "__self__", function)
    device = network.head.weight.device
    return torch.cat(
        [function(to_plus_minus_one(torch.from_numpy(part).to(device))).cpu() for part in chunks(images_NHWC)]
    ).numpy()


def chunks(images_NHWC: np.ndarray) -> list[np.ndarray]:
    return [images_NHWC[i : i + CHUNK] for i in range(0, len(images_NHWC), CHUNK)]


def shares(logits_NK: np.ndarray, wanted: np.ndarray, names: tuple[str, ...]) -> tuple[Share, dict[str, Share]]:
    """Shares of right answers; unknown attributes do not count."""
    if wanted.ndim == 1:
        right_N = logits_NK.argmax(1) == wanted
        by_name = {name: Share.of(right_N[wanted == k]) for k, name in enumerate(names)}
        return Share.of(right_N), by_name
    right_NK, known_NK = (logits_NK > 0) == (wanted == 1), wanted >= 0
    by_name = {name: Share.of(right_NK[known_NK[:, k], k]) for k, name in enumerate(names)}
    # Answers about one image are correlated, so the images are counted as the independent trials.
    return Share.of(right_NK[known_NK], independent=int(known_NK.any(1).sum())), by_name


# ------------------------------------------------------------------------------------------------------- training


def judge_of(splits: Splits, config: ClassifierConfig, cache: Path, device: torch.device) -> Judge:
    """The classifier of these images, from the cache or trained and stored there; raises Refused without labels or attributes."""
    config.check()
    names, several = names_of(splits.train)
    folder = cache / f"classifier-{key_of(splits, config)}"
    network = network_of(splits.train, config, names).to(device)
    stored = read(folder, network)
    if stored is None:
        say(f"training a classifier on {len(splits.train):,} images, {config.epochs} epochs: only once for this data")
        train(network, splits.train, config, device)
        write(folder, network, splits, config, names)
        stored = read(folder, network)  # if another process wrote at the same time, what is stored now counts
    else:
        say(f"the classifier of this data is in {folder}: test accuracy {stored['accuracy']['value']:.1%}")
    network.eval().requires_grad_(False)
    return Judge(
        network=network,
        names=names,
        attributes=several,
        accuracy=Share.from_json(stored["accuracy"]),
        by_name={name: Share.from_json(share) for name, share in stored["by_name"].items()},
        key=digest(folder / WEIGHTS)[:16],
        folder=folder,
    )


def names_of(images: Images) -> tuple[tuple[str, ...], bool]:
    """The names that the classifier predicts, and whether they are attributes; classes are preferred to attributes."""
    if images.labels_N is not None:
        highest = int(images.labels_N.max()) + 1
        return images.classes or tuple(str(k) for k in range(highest)), False
    if images.attributes_NK is not None:
        return images.attributes, True
    raise Refused(
        "the data has neither labels nor attributes, so no classifier can judge samples of it: prepare it with labels, "
        "or give --features.network inception or dinov2"
    )


def wanted(images: Images) -> np.ndarray:
    """What the classifier should see in each image: labels_N, or attributes_NK."""
    return images.labels_N if images.labels_N is not None else images.attributes_NK


def key_of(splits: Splits, config: ClassifierConfig) -> str:
    said = json.dumps([VERSION, splits.fingerprint, asdict(config)])
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def network_of(images: Images, config: ClassifierConfig, names: tuple[str, ...]) -> Classifier:
    _, side, _, channels = images.images_NHWC.shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Classifier(channels, side, config.width, len(names))
    return network.to(memory_format=torch.channels_last)


def train(network: Classifier, images: Images, config: ClassifierConfig, device: torch.device) -> None:
    """Trains with AdamW; the learning rate rises and falls linearly."""
    network.train()
    random = torch.Generator().manual_seed(config.seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    per_epoch = -(-len(images) // config.batch_size)
    progress = Progress("training the classifier", config.epochs * len(images))
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: triangle(step, config.epochs * per_epoch))
    for epoch in range(config.epochs):
        order_N = torch.randperm(len(images), generator=random).numpy()
        for first in range(0, len(images), config.batch_size):
            places_M = order_N[first : first + config.batch_size]
            if len(places_M) > 1 or len(images) == 1:  # a batch norm of one image has no variance
                step(network, optimizer, images.take(places_M), config, random, device)
            rates.step()
            progress.at(epoch * len(images) + first + len(places_M))


def step(network, optimizer, images: Images, config: ClassifierConfig, random: torch.Generator, device) -> None:
    x_NCHW = augmented(to_plus_minus_one(torch.from_numpy(images.images_NHWC).to(device)), config, random)
    loss = loss_of(network(x_NCHW), torch.from_numpy(wanted(images)).to(device))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def triangle(step: int, steps: int) -> float:
    """The factor on the learning rate at a step: rising over the first fifth, then falling to 0."""
    progress = (step + 1) / (steps + 1)
    return progress / 0.2 if progress < 0.2 else (1 - progress) / 0.8


def loss_of(logits_NK: Tensor, wanted: Tensor) -> Tensor:
    """Cross entropy for labels_N, or binary cross entropy over the known entries of attributes_NK."""
    if wanted.ndim == 1:
        return F.cross_entropy(logits_NK, wanted)
    known_NK = wanted >= 0
    loss_NK = F.binary_cross_entropy_with_logits(logits_NK, wanted.clamp(min=0).float(), reduction="none")
    return (loss_NK * known_NK).sum() / known_NK.sum().clamp(min=1)


def augmented(x_NCHW: Tensor, config: ClassifierConfig, random: torch.Generator) -> Tensor:
    """The batch moved by one random shift, with black at the borders; each image is mirrored with probability 1/2."""
    s = config.shift
    if config.flip:
        flip_N = torch.rand(len(x_NCHW), generator=random).to(x_NCHW.device) < 0.5
        x_NCHW = torch.where(flip_N[:, None, None, None], x_NCHW.flip(3), x_NCHW)
    if s:
        top, left = torch.randint(0, 2 * s + 1, (2,), generator=random).tolist()
        height, width = x_NCHW.shape[2:]
        x_NCHW = F.pad(x_NCHW, (s, s, s, s), value=-1.0)[:, :, top : top + height, left : left + width]
    return x_NCHW.contiguous(memory_format=torch.channels_last)


# ------------------------------------------------------------------------------------------------------------ cache


def read(folder: Path, network: Classifier) -> dict | None:
    """Loads a stored classifier's weights into the network and returns its facts; None if there is none that can be read."""
    weights, facts = folder / WEIGHTS, folder / "classifier.json"
    if not (weights.exists() and facts.exists()):
        return None
    try:
        stored = json.loads(facts.read_text())
        for share in (stored["accuracy"], *stored["by_name"].values()):
            Share.from_json(share)
        network.load_state_dict(load_file(weights))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        say(f"{folder} cannot be read ({first_line(error)}): training the classifier again")
        return None
    return stored


def write(folder: Path, network: Classifier, splits: Splits, config: ClassifierConfig, names: tuple[str, ...]) -> None:
    """Stores weights and test accuracy; the JSON comes last, since the pair is valid only once it is there."""
    network.eval()
    accuracy, by_name = shares(run(network, splits.held_out.images_NHWC), wanted(splits.held_out), names)
    facts = {
        "accuracy": accuracy.to_json(),
        "by_name": {name: share.to_json() for name, share in by_name.items()},
        "tested_on": splits.held_out_is,
        "settings": asdict(config),
        "data": splits.fingerprint,
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.cpu().contiguous() for name, value in network.state_dict().items()}
    with draft_of(folder / WEIGHTS) as draft:
        save_file(tensors, draft)
    write_json(folder / "classifier.json", facts)
    say(f"classifier: accuracy {accuracy} on {len(splits.held_out):,} images of {splits.held_out_said}; in {folder}")
