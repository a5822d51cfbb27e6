"""Images per CPU-second from the same shards: our reader with DALI and with Pillow, webdataset with Pillow, plain DALI.

Every contender yields uint8 batches with their captions. They take turns within a round, and ratios are computed within
a round, so that other load slows all of them alike. Our reader reads in shuffled order, the others in the shards'
order.

    python bench/loader.py                   # table, and its record in bench/results
"""

import argparse
import io
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from record import command, installed, load_average, machine, refuse, result_path, table, write_json

from duotone.data import captioned_shapes
from duotone.data.batch import Plan
from duotone.data.order import samples_at
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.data.write_shards import Sample, write_shards

BATCH = 64
BASELINE = "webdataset + Pillow"


@dataclass(frozen=True)
class Job:
    """Shards, and the side of the images wanted from them."""

    name: str
    folder: Path
    size: int
    extension: str


def jobs(folder: Path) -> list[Job]:
    """Four sets: photographs as COCO stores them, shrunk ones, the same stored decoded, and the embedded drawings."""
    whole, shrunk = list(_photographs(256, None)), list(_photographs(1024, 160))
    write_shards((_jpeg(pixels, 75) for pixels in whole), folder / "whole", per_shard=128)
    write_shards((_jpeg(pixels, 95) for pixels in shrunk), folder / "shrunk", per_shard=512)
    decoded = (Sample(image=_resized(pixels, 128), captions=["a photograph"]) for pixels in shrunk)
    write_shards(decoded, folder / "decoded", image_format="npy", per_shard=512)
    captioned_shapes.write(folder / "shapes", count=2048)
    return [
        Job("photographs, about 600 x 427, JPEG q75 -> 128", folder / "whole", 128, "jpg"),
        Job("photographs shrunk to 160, JPEG q95 -> 128", folder / "shrunk", 128, "jpg"),
        Job("photographs stored decoded at 128", folder / "decoded", 128, "npy"),
        Job("captioned shapes at 32, JPEG q95", folder / "shapes", 32, "jpg"),
    ]


def _photographs(number: int, side: int | None) -> Iterator[np.ndarray]:
    """Crops of scikit-learn's two sample photographs: nearly whole, or squares shrunk to `side`."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError:
        raise Refused(
            "the photographs come with scikit-learn, which is not installed: pip install scikit-learn"
        ) from None
    photographs, rng = load_sample_images().images, np.random.default_rng(0)
    for index in range(number):
        photograph = photographs[index % 2]
        if side is None:
            left = rng.integers(0, 40)
            yield photograph[:, left : left + 600]
        else:
            length = rng.integers(240, 427)
            top, left = rng.integers(0, 427 - length), rng.integers(0, 640 - length)
            yield _resized(photograph[top : top + length, left : left + length], side)


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


def _jpeg(pixels: np.ndarray, quality: int) -> Sample:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return Sample(image=stream.getvalue(), extension="jpg", captions=["a photograph"])


def ours(decoder: str) -> Callable[[Job, int], Iterator]:
    """Our reader, in shuffled order, decoding ahead on its own thread."""

    def batches(job: Job, threads: int) -> Iterator:
        shards = Shards(shards=job.folder, size=job.size, decoder=decoder, threads=threads)
        dataset = shards.open(torch.device("cpu"), require_captions=True)
        zeros_N2, zeros_N = np.zeros((BATCH, 2)), np.zeros(BATCH)

        def plan(step: int) -> Plan:
            positions_N = np.arange(step * BATCH, (step + 1) * BATCH)
            samples_N = samples_at(0, positions_N, dataset.count)
            return Plan(positions_N=positions_N, samples_N=samples_N, crops_N2=zeros_N2, captions_N=zeros_N)

        for batch in dataset.batches(map(plan, count())):
            yield batch.images_NHWC, batch.captions

    return batches


def webdataset_pillow(job: Job, threads: int) -> Iterator:
    """webdataset's pipeline with Pillow, with the same square crop and filter; it decodes on one thread per process."""
    import webdataset

    def square(sample: tuple) -> tuple[np.ndarray, str]:
        image, caption = sample
        if isinstance(image, np.ndarray):
            return image, caption
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        box = (left, top, left + side, top + side)
        return np.asarray(image.resize((job.size, job.size), Image.Resampling.BICUBIC, box=box)), caption

    urls = [str(path) for path in sorted(job.folder.glob("*.tar"))]
    pipeline = webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple(job.extension, "txt").map(square)
    for images, captions in pipeline.repeat().batched(BATCH):
        yield torch.from_numpy(np.stack(images)), list(captions)


def plain_dali(job: Job, threads: int) -> Iterator:
    """DALI's own WebDataset reader, decoder and pipelining."""
    from nvidia.dali import Pipeline, fn, types

    pipeline = Pipeline(BATCH, threads, None, prefetch_queue_depth=2)
    with pipeline:
        paths = [str(path) for path in sorted(job.folder.glob("*.tar"))]
        encoded, caption = fn.readers.webdataset(
            paths=paths, ext=[job.extension, "txt"], missing_component_behavior="error"
        )
        images = fn.decoders.image(encoded, output_type=types.RGB)
        images = fn.resize(images, size=[job.size] * 2, mode="not_smaller", interp_type=types.INTERP_CUBIC)
        pipeline.set_outputs(fn.crop(images, crop=[job.size] * 2), caption)
    pipeline.build()
    while True:
        images, captions = pipeline.run()
        texts = [bytes(captions.at(index)).decode() for index in range(BATCH)]
        yield torch.from_numpy(np.array(images.as_tensor())), texts


CONTENDERS = {
    "ours, DALI": ours("dali"),
    "ours, Pillow": ours("pillow"),
    BASELINE: webdataset_pillow,
    "plain DALI": plain_dali,
}


def rate(batches: Iterator, seconds: float) -> tuple[float, float]:
    """Images per CPU-second (of all threads) and images per second, after a warm-up; the first batch is checked."""
    images_NHWC, captions = next(batches)
    assert images_NHWC.dtype == torch.uint8 and len(images_NHWC) == len(captions) == BATCH
    for _ in range(4):
        next(batches)
    wall, cpu, done = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - wall < seconds:
        next(batches)
        done += BATCH
    return done / (time.process_time() - cpu), done / (time.perf_counter() - wall)


def measure(job: Job, rounds: int, seconds: float, threads: int) -> dict:
    """Medians over the rounds, and medians of the ratios to the baseline and to plain DALI."""
    names = [name for name in CONTENDERS if job.extension != "npy" or name not in ("plain DALI", "ours, Pillow")]
    running = {name: CONTENDERS[name](job, threads) for name in names}
    rows = [{name: rate(running[name], seconds) for name in names} for _ in range(rounds)]
    for batches in running.values():
        batches.close()
    result = {"job": job.name, "batch": BATCH, "size": job.size, "contenders": {}}
    for name in names:
        entry = {
            "images_per_cpu_second": statistics.median(row[name][0] for row in rows),
            "images_per_second": statistics.median(row[name][1] for row in rows),
        }
        for other in (BASELINE, "plain DALI"):
            if other in names:
                entry[f"times {other}"] = statistics.median(row[name][0] / row[other][0] for row in rows)
        result["contenders"]["ours, stored" if job.extension == "npy" and name.startswith("ours") else name] = entry
    return result


def rows_of(results: list[dict]) -> list[dict]:
    rows = []
    for result in results:
        for name, entry in result["contenders"].items():
            ratios = {f"x {other}": entry.get(f"times {other}") for other in (BASELINE, "plain DALI")}
            rows.append(
                {"set": result["job"], "reader": name, "images / CPU-second": entry["images_per_cpu_second"]} | ratios
            )
    return rows


def main() -> None:
    """Measures, prints, and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one measurement")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", "--out", type=Path, help="where the result goes (default: bench/results/)")
    options = parser.parse_args()
    if options.rounds < 1 or options.seconds <= 0 or options.threads < 1:
        refuse("--rounds and --threads must be at least 1, and --seconds above 0")
    path, load, measured = result_path(options.json, "loader"), load_average(), []
    packages = ("pillow", "webdataset", "nvidia-dali-cuda130", "numpy", "scikit-learn")
    about = {"command": command(), "machine": machine(), "threads": options.threads, "rounds": options.rounds}
    about |= {"seconds": options.seconds, "processor": platform.machine()}
    about |= {"versions": {name: installed(name) for name in packages}}
    try:
        with tempfile.TemporaryDirectory() as folder:
            for job in jobs(Path(folder)):
                measured.append(measure(job, options.rounds, options.seconds, options.threads))
                write_json(path, about | {"load_average": [load, load_average()], "results": measured})
    except Refused as refusal:
        refuse(str(refusal))
    print(table(rows_of(measured)))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
