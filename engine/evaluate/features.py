"""Feature networks: uint8 images to vectors whose distances mean something. One is chosen by name and named in the result.

N images of H x W pixels and C channels, D features.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duotone.data.refusal import Refused, first_line
from duotone.data.whole_file import draft_of
from duotone.engine.checkpoint import digest
from duotone.engine.evaluate.classifier import Judge
from duotone.engine.evaluate.images import Splits
from duotone.engine.evaluate.progress import Progress
from duotone.engine.log import say

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CHUNK = 64
VERSION = 2
"""Version of how features are computed; cached features of another version are computed again."""


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig:
    """Which network turns images into features."""

    network: Literal["auto", "classifier", "inception", "dinov2"] = "auto"
    """auto: the classifier if the data has labels or attributes, otherwise Inception."""
    weights: Path | None = None
    """inception: weights (.pth) from torch-fidelity, which published distances use, or from torchvision; by default, those in
    torch.hub's folder. dinov2: a folder that transformers loads."""


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """What every feature network provides: a name, a key that identifies its weights, its width and a function."""

    name: str
    key: str
    width: int
    embed: Callable[[np.ndarray], np.ndarray]
    """uint8 (N, H, W, C) to features (N, D) fp32."""

    def __call__(self, images_NHWC: np.ndarray, what: str = "features") -> np.ndarray:
        """features_ND in float64."""
        progress, parts = Progress(what, len(images_NHWC)), []
        for first in range(0, len(images_NHWC), 8 * CHUNK):
            parts.append(self.embed(images_NHWC[first : first + 8 * CHUNK]))
            progress.at(first + len(parts[-1]))
        return np.concatenate(parts).astype(np.float64)


def choose(config: FeaturesConfig, judge: Judge | None, device: torch.device) -> FeatureNetwork:
    """The network asked for; logs one line that says which and why, and raises Refused if it cannot be loaded."""
    if config.network == "auto":
        name = "classifier" if judge else "inception"
        why = "the data has labels or attributes" if judge else "the data has neither labels nor attributes"
    else:
        name, why = config.network, "as asked for"
    try:
        network = BUILD[name](config, judge, device)
    except Refused as refusal:
        raise (
            refusal if config.network != "auto" else Refused(f"{why}, so no classifier gives features; {refusal}")
        ) from None
    say(f"features: {network.name} ({why}; --features.network chooses)")
    return network


def from_classifier(config: FeaturesConfig, judge: Judge | None, device: torch.device) -> FeatureNetwork:
    if judge is None:
        raise Refused(
            "--features.network classifier needs labels or attributes, but the data has none: give inception or dinov2"
        )
    width = judge.network.head.in_features
    return FeatureNetwork(
        name=f"the data's own classifier, penultimate layer ({width})",
        key=f"classifier-{judge.key}",
        width=width,
        embed=judge.features,
    )


def inception(config: FeaturesConfig, judge: Judge | None, device: torch.device) -> FeatureNetwork:
    """Inception v3's 2048 pooled features before its last layer. The weights decide between two networks: TensorFlow's of 2015,
    which published Frechet distances use, and torchvision's."""
    path = config.weights or newest_inception()
    if path is None or not path.is_file():
        raise Refused(
            f"Inception's weights are not at {path or hub_folder()}: fetch torch-fidelity's {FID_WEIGHTS} (used in published "
            "distances) or torchvision's inception_v3_google-*.pth, and give --features.weights FILE"
        )
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        classes = len(weights["fc.weight"])
    except Exception as error:  # a damaged pickle may raise anything
        raise Refused(f"{path} holds no Inception v3 ({first_line(error)[:200]}): fetch it again") from None
    name, build = OF_CLASSES.get(classes, OF_CLASSES[1000])
    try:
        embed = build(path, weights, device)
    except ImportError as error:
        raise Refused(
            f"{path} needs a library which is not installed ({first_line(error)}): pip install {name}"
        ) from None
    except RuntimeError as error:
        raise Refused(f"{path} is not {name}'s Inception v3 ({first_line(error)[:200]}): fetch it again") from None
    return FeatureNetwork(
        name=f"Inception v3 of {name} (2048)", key=f"inception-{digest(path)[:16]}", width=2048, embed=embed
    )


def of_published_distances(path: Path, weights: dict[str, Tensor], device: torch.device) -> Callable:
    """TensorFlow's network with its own resizing, as implemented by torch-fidelity."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    # This unpickles the file without restrictions. That is safe: it was loaded with weights_only before, so it has only tensors.
    network = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=str(path))
    network = network.to(device).eval().requires_grad_(False)  # not every version does this itself

    def colours(images_NHWC: np.ndarray) -> Tensor:
        return torch.from_numpy(images_NHWC).to(device).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)

    return in_parts(lambda images_NHWC: network(colours(images_NHWC))[0])


def of_torchvision(path: Path, weights: dict[str, Tensor], device: torch.device) -> Callable:
    from torchvision.models import inception_v3

    network = inception_v3(weights=None, init_weights=False, transform_input=True)
    network.load_state_dict(weights)
    network.fc = torch.nn.Identity()
    return resized(network.to(device).eval().requires_grad_(False), 299, device)


OF_CLASSES = {1008: ("torch-fidelity", of_published_distances), 1000: ("torchvision", of_torchvision)}
FID_WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"


def hub_folder() -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints"


def newest_inception() -> Path | None:
    """The weights in torch.hub's folder: those of published distances, which have two names, are preferred to torchvision's."""
    for name in ("*inception-2015-12-05-*.pth", "inception_v3_google-*.pth"):
        found = sorted(hub_folder().glob(name))
        if found:
            return found[-1]
    return None


def dinov2(config: FeaturesConfig, judge: Judge | None, device: torch.device) -> FeatureNetwork:
    """DINOv2 (Oquab et al. 2023) from a folder: the class token after the last norm."""
    if config.weights is None or not config.weights.is_dir():
        raise Refused(
            f"DINOv2's folder does not exist ({config.weights}): give --features.weights a folder that transformers loads"
        )
    from transformers import AutoModel

    try:
        network = AutoModel.from_pretrained(config.weights, local_files_only=True)
    except Exception as error:  # damaged weights, or weights of another size, may raise anything
        raise Refused(f"{config.weights} holds no model that transformers loads ({first_line(error)})") from None
    if network.config.model_type != "dinov2":
        raise Refused(f"{config.weights} holds a {network.config.model_type}, not a dinov2: give another folder")
    network = network.to(device).eval().requires_grad_(False)
    weights = sorted(config.weights.glob("*.safetensors")) or sorted(config.weights.glob("*.bin"))
    read = "".join(digest(path) for path in (*weights, config.weights / "config.json"))
    return FeatureNetwork(
        name=f"DINOv2 ({network.config.hidden_size})",
        key=f"dinov2-{hashlib.sha256(read.encode()).hexdigest()[:16]}",
        width=network.config.hidden_size,
        embed=resized(lambda x_NCHW: network(pixel_values=x_NCHW).last_hidden_state[:, 0], 224, device),
    )


BUILD = {"classifier": from_classifier, "inception": inception, "dinov2": dinov2}


def resized(network: Callable, side: int, device: torch.device) -> Callable[[np.ndarray], np.ndarray]:
    """`network` on images as it expects them: three channels, `side` pixels (bicubic, antialiased), ImageNet's mean and deviation."""
    mean_C11 = torch.tensor(IMAGENET_MEAN, device=device)[:, None, None]
    std_C11 = torch.tensor(IMAGENET_STD, device=device)[:, None, None]

    def prepared(images_NHWC: np.ndarray) -> Tensor:
        x_NCHW = torch.from_numpy(images_NHWC).to(device).permute(0, 3, 1, 2).float() / 255
        x_NCHW = x_NCHW.expand(-1, 3, -1, -1)
        x_NCHW = F.interpolate(x_NCHW, size=(side, side), mode="bicubic", antialias=True, align_corners=False)
        return (x_NCHW.clamp(0, 1) - mean_C11) / std_C11

    return in_parts(lambda images_NHWC: network(prepared(images_NHWC)))


def in_parts(network: Callable[[np.ndarray], Tensor]) -> Callable[[np.ndarray], np.ndarray]:
    """`network` applied to CHUNK images at a time; features (N, D) in fp32."""

    @torch.inference_mode()
    def embed(images_NHWC: np.ndarray) -> np.ndarray:
        parts = [images_NHWC[i : i + CHUNK] for i in range(0, len(images_NHWC), CHUNK)]
        return torch.cat([network(part).float().cpu() for part in parts]).numpy()

    return embed


@dataclass(frozen=True, kw_only=True)
class RealFeatures:
    """Features of the real images, float64."""

    parts: dict[str, np.ndarray]
    """(N, D) for each set that samples are measured against, by its name in Splits.parts."""
    seen_ND: np.ndarray

    @property
    def train_ND(self) -> np.ndarray:
        return self.parts["train"]

    @property
    def held_out_ND(self) -> np.ndarray:
        return self.parts["held_out"]


def real_features(network: FeatureNetwork, splits: Splits, cache: Path) -> RealFeatures:
    """From the cache, keyed by data and network, or computed and stored there in fp32, the precision of the network."""
    said = f"{VERSION} {splits.fingerprint} {network.key}"
    path = cache / f"features-{hashlib.sha256(said.encode()).hexdigest()[:16]}.safetensors"
    found = stored(path, splits) or made(network, splits, path)
    parts = {name: found[name].double().numpy() for name in splits.parts}
    seen_ND = parts["train"] if splits.is_apart else np.concatenate([parts["train"], parts["held_out"]])
    return RealFeatures(parts=parts, seen_ND=seen_ND)


def stored(path: Path, splits: Splits) -> dict[str, Tensor] | None:
    """Features from the cache; None if they are absent or cannot be read."""
    if not path.exists():
        return None
    try:
        found = load_file(path)
        return {name: found[name] for name in splits.parts}
    except (OSError, SafetensorError, KeyError) as error:
        say(f"{path} cannot be read ({first_line(error)}): computing the features again")
        return None


def made(network: FeatureNetwork, splits: Splits, path: Path) -> dict[str, Tensor]:
    say(f"features of {sum(map(len, splits.parts.values())):,} real images: only once for this data and network")
    found = {
        name: torch.from_numpy(network(images.images_NHWC, f"features, {name.replace('_', ' ')}")).float()
        for name, images in splits.parts.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with draft_of(path) as draft:
        save_file(found, draft)
    return found
