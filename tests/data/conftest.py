"""Small real shards and pictures for the tests of data/."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from duotone.data.batch import Plan


@pytest.fixture(scope="session")
def photos():
    """Two real photographs, uint8 (427, 640, 3), which come with scikit-learn."""
    datasets = pytest.importorskip("sklearn.datasets")
    return datasets.load_sample_images().images


@pytest.fixture(scope="session")
def encode():
    """encode(pixels, format, **options) -> bytes, by Pillow, or by numpy for "npy"."""

    def encode(pixels, format="JPEG", mode="RGB", **options):
        stream = io.BytesIO()
        if format == "npy":
            np.save(stream, pixels)
        else:
            Image.fromarray(pixels).convert(mode).save(stream, format, **options)
        return stream.getvalue()

    return encode


@pytest.fixture(scope="session")
def members_of(photos, encode):
    """members_of(count) -> [(name, bytes)]: small real pictures, each with a caption and a JSON."""

    def members_of(count):
        found = []
        for number in range(count):
            photo = photos[number % 2][number * 7 % 300 :][:48, number * 11 % 500 :][:, :64]
            found.append((f"{number:05d}.jpg", encode(photo, quality=90)))
            found.append(
                (f"{number:05d}.json", json.dumps({"caption": f"picture {number}", "label": number % 3}).encode())
            )
            found.append((f"{number:05d}.txt", f"picture {number}".encode()))
        return found

    return members_of


@pytest.fixture(scope="session")
def write_tar():
    """write_tar(path, [(name, bytes)], format=...): writes a tar with Python's tarfile."""

    def write_tar(path, members, format=tarfile.USTAR_FORMAT):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w", format=format) as tar:
            for name, raw in members:
                info = tarfile.TarInfo(name)
                info.size = len(raw)
                tar.addfile(info, io.BytesIO(raw))
        return path

    return write_tar


@pytest.fixture
def shard_folder(tmp_path, members_of, write_tar):
    """A folder of two shards of 7 and 5 samples, as any WebDataset tool would write them."""
    members = members_of(12)
    write_tar(tmp_path / "shards" / "00000.tar", members[: 3 * 7])
    write_tar(tmp_path / "shards" / "00001.tar", members[3 * 7 :])
    return tmp_path / "shards"


@pytest.fixture(scope="session")
def plan_for():
    """plan_for(samples, crops=..., captions=...) -> Plan."""

    def plan_for(samples, crops=None, captions=None):
        samples_N = np.asarray(samples, dtype=np.int64)
        count = len(samples_N)
        return Plan(
            positions_N=np.arange(count),
            samples_N=samples_N,
            crops_N2=np.zeros((count, 2)) if crops is None else np.asarray(crops, dtype=np.float64),
            captions_N=np.zeros(count) if captions is None else np.asarray(captions, dtype=np.float64),
        )

    return plan_for


@pytest.fixture(scope="session")
def cpu():
    return torch.device("cpu")
