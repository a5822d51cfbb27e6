"""What guidance costs: forwards per evaluation and milliseconds per image for each way to compute both predictions.

    python bench/sampling.py                          # random weights: the reference network, on a CPU the small one
    python bench/sampling.py --run runs/coco_clip     # a trained model, with its own prompts
    python bench/sampling.py --run runs/captioned_shapes --quality

Each way adds a saving to the one before: two forwards (the oracle), both in one batch, keys and values of the text
projected once, the layers before the text computed once for both. These are exact, and their largest difference from
the oracle is shown in pixel levels of 255. Guidance in an interval of noise levels is not exact. On a model of the
captioned shapes, --quality sweeps intervals and shows forwards against the share of pictures with the colours of their
caption; --confirm compares one interval with guidance everywhere on many new samples.

    python bench/sampling.py --run runs/short --confirm --interval 0.3 10 --per-caption 12
"""

import argparse
import statistics
import time
from dataclasses import dataclass, replace
from itertools import islice, product
from pathlib import Path

import torch
from clocks import spread
from networks import NAMED, SIZES
from record import command, load_average, machine, refuse, result_path, table, write_json

from duotone.data import captioned_shapes
from duotone.data.refusal import Refused
from duotone.data.shards import Shards
from duotone.engine import artifact, draws
from duotone.engine.conditioning.base import Conditioning, Facts
from duotone.engine.evaluate.captioned_shapes import rightness
from duotone.engine.model.network import Network
from duotone.engine.objectives.edm import EDM
from duotone.engine.recipe import Recipe
from duotone.engine.sample import image_shape, noise, sample
from duotone.engine.sampling.guidance import Guidance, GuidedDenoiser, cost_of_pair
from duotone.engine.sampling.samplers.heun import heun
from duotone.engine.sampling.steering import condition
from duotone.engine.speed import SAMPLING, choose, set_up

EVERYWHERE = (0.0, float("inf"))

# ----------------------------------------------------------------------------------------------------------------- ways


class OneBatch(GuidedDenoiser):
    """Both branches in one batch; their text is projected again at every step, and nothing is shared."""

    projects_once = False

    def __init__(self, *parts):
        super().__init__(*parts)
        if not self.projects_once:
            self.keys_values = dict.fromkeys(self.keys_values)

    def begins_alike(self) -> bool:
        return False


class TwoForwards(OneBatch):
    """The plainest way, and the oracle: one branch after the other."""

    def __init__(self, *parts):
        super().__init__(*parts)
        images = self.half.tokens_NMD.shape[0]
        self.other = Conditioning(**{name: None if v is None else v[images:] for name, v in vars(self.both).items()})
        self.keys_values[id(self.other)] = None

    def outputs(self, scaled_NCHW, noise_N):
        branches = [self.predict(self.network, scaled_NCHW, noise_N, c) for c in (self.half, self.other)]
        return torch.cat(branches)


class KeysOnce(OneBatch):
    projects_once = True


@dataclass(frozen=True)
class Way:
    """One way to sample; an exact one gives the oracle's picture."""

    name: str
    denoiser: type
    scale: float
    interval: tuple[float, float] = EVERYWHERE
    exact: bool = True


def ways(scale: float, interval: tuple[float, float]) -> list[Way]:
    low, high = interval
    return [
        Way("two forwards", TwoForwards, scale),
        Way("one batch", OneBatch, scale),
        Way("+ keys and values once", KeysOnce, scale),
        Way("+ common layers once", GuidedDenoiser, scale),
        Way(f"+ interval {low:g} to {high:g}", GuidedDenoiser, scale, interval, exact=False),
        Way("without guidance", GuidedDenoiser, 1.0, exact=False),
    ]


# ------------------------------------------------------------------------------------------------------------- sampling


@dataclass(frozen=True)
class Job:
    """What every way samples: the same model, condition, noise levels and seed."""

    model: artifact.Model
    both: Conditioning
    images: int
    sigmas: torch.Tensor
    pair_cost: float


def job_of(model: artifact.Model, images: int, steps: int) -> Job:
    both = condition_of(model, images)
    pair_cost = cost_of_pair(model.network.unet, image_shape(model, None), both.tokens_NMD.shape[1])
    return Job(model, both, images, model.objective.falling_sigmas(steps), pair_cost)


def condition_of(model: artifact.Model, images: int) -> Conditioning:
    """The model's own prompts and its null condition; for random weights, random tokens."""
    config = model.network.unet.config
    if "text" not in model.network.conditioners:
        g = torch.Generator().manual_seed(0)
        tokens_NMD = torch.randn(2 * images, 77, config.context_width, generator=g)
        return Conditioning(tokens_NMD=tokens_NMD.to(model.device, model.network.dtype))
    prompts = list(islice(captioned_shapes.captions(), images))
    values = {"text": (prompts * images)[:images]}
    return condition(model, values, {}, images, (model.size, model.size), doubled=True)


def sampled(job: Job, way: Way) -> tuple[torch.Tensor, float]:
    """The final x_NCHW, and how many forwards an image took."""
    guidance = Guidance(scale_N=torch.full((job.images,), way.scale, device=job.model.device), interval=way.interval)
    denoise = way.denoiser(job.model.network, job.model.objective, job.both, guidance)
    denoise.pair_cost = job.pair_cost  # given beforehand: counting multiplications is not part of sampling
    shape = (job.images, *image_shape(job.model, None))
    seeds = [(0, number) for number in range(job.images)]
    x_NCHW = noise(seeds, draws.Purpose.SAMPLE_START, 0, shape, job.model.device) * job.sigmas[0].item()
    with torch.inference_mode():
        return heun(denoise, x_NCHW, job.sigmas), denoise.forwards / job.images


def evaluations(job: Job) -> float:
    """Forward passes of one image without guidance, one for each call of the denoiser."""
    return sampled(job, Way("", GuidedDenoiser, 1.0))[1]


def timed(job: Job, chosen: list[Way], rounds: int) -> dict[str, list[float]]:
    """Milliseconds per image, every way once in each round."""
    cuda = job.model.device.type == "cuda"
    clock = time.perf_counter if cuda else time.process_time
    milliseconds = {way.name: [] for way in chosen}
    for _ in range(rounds):
        for way in chosen:
            began = clock()
            sampled(job, way)
            if cuda:
                torch.cuda.synchronize()
            milliseconds[way.name].append(1e3 * (clock() - began) / job.images)
    return milliseconds


def compare(job: Job, chosen: list[Way], rounds: int) -> list[dict]:
    """One row per way: forwards, times, and for exact ones the distance from the oracle."""
    oracle, calls = sampled(job, chosen[0])[0], evaluations(job)
    found = {way.name: sampled(job, way) for way in chosen}
    times = timed(job, chosen, rounds)
    rows = []
    for way in chosen:
        x_NCHW, forwards = found[way.name]
        base = statistics.median(times[chosen[0].name])
        row = {"way": way.name, "images": job.images, "forwards_per_evaluation": forwards / calls}
        row |= {"milliseconds_per_image": spread(times[way.name])}
        row |= {"times_two_forwards": base / statistics.median(times[way.name])}
        rows.append(row | {"largest_pixel_difference": levels_apart(x_NCHW, oracle) if way.exact else None})
    return rows


def levels_apart(x_NCHW: torch.Tensor, oracle_NCHW: torch.Tensor) -> float:
    """The largest difference between pictures as they are shown, in levels of 255 and before rounding."""
    shown = [(t.float().clamp(-1, 1) + 1) * 127.5 for t in (x_NCHW, oracle_NCHW)]
    return (shown[0] - shown[1]).abs().max().item()


# -------------------------------------------------------------------------------------------------------------- quality


def intervals() -> list[tuple[float, float]]:
    """Guidance everywhere, and within every interval between a few fixed noise levels."""
    edges = (0.0, 0.3, 1.0, 3.0, 10.0, float("inf"))
    return [
        EVERYWHERE,
        *((low, high) for low, high in product(edges, edges) if low < high and (low, high) != EVERYWHERE),
    ]


def quality(model: artifact.Model, scale: float, steps: int, per_caption: int) -> list[dict]:
    """Forwards per evaluation against the share of pictures with the caption's colour and background."""
    captions = [caption for caption in captioned_shapes.captions() for _ in range(per_caption)]
    calls = None
    rows = []
    for guidance, interval in [(1.0, EVERYWHERE), *((scale, interval) for interval in intervals())]:
        images = sample(
            model, prompts=captions, guidance=guidance, interval=interval, steps=steps, seed=1, chunk=len(captions)
        )
        calls = calls or model.forwards
        right = [rightness(image, caption) for image, caption in zip(images, captions)]
        rows.append(
            {"guidance": guidance, "from": interval[0], "to": str(interval[1]), "samples": len(captions),
             "forwards_per_evaluation": model.forwards / calls,
             "colour_and_background": sum(all(r[1:]) for r in right) / len(right),
             "everything": sum(map(all, right)) / len(right)}
        )  # fmt: skip
        print(table(rows[-1:]).splitlines()[1], flush=True)
    return rows


def verdict(rows: list[dict], most: float = 1.4) -> dict:
    """The cheapest interval that is as good as guidance everywhere, and whether it takes at most `most` forwards."""
    everywhere = rows[1]["colour_and_background"]
    as_good = [row for row in rows[1:] if row["colour_and_background"] >= everywhere]
    cheapest = min(as_good, key=lambda row: row["forwards_per_evaluation"])
    return {"everywhere": everywhere, "unguided": rows[0]["colour_and_background"], "cheapest_as_good": cheapest, "at_most": most,
            "holds": cheapest["forwards_per_evaluation"] <= most}  # fmt: skip


def confirmed(model: artifact.Model, scale: float, interval: tuple, steps: int, per_caption: int) -> dict:
    """One interval against guidance everywhere, in pairs from the same noise, none of which helped to choose the interval.

    The difference is of shares of pictures with the caption's colour and background, with its 95 % interval over pairs.
    """
    captions = captioned_shapes.captions()
    right = {"everywhere": [], "interval": []}
    forwards = {}
    for seed in range(100, 100 + per_caption):
        for name, where in (("everywhere", EVERYWHERE), ("interval", interval)):
            settings = dict(guidance=scale, interval=where, steps=steps, seed=seed, chunk=len(captions))
            images = sample(model, prompts=captions, **settings)
            right[name] += [all(rightness(image, caption)[1:]) for image, caption in zip(images, captions)]
            forwards[name] = model.forwards
        print(
            f"{len(right['interval']):5} pictures: {', '.join(f'{k} {statistics.fmean(v):.1%}' for k, v in right.items())}",
            flush=True,
        )
    apart = [a - b for a, b in zip(right["interval"], right["everywhere"])]
    centre, margin = statistics.fmean(apart), 1.96 * statistics.stdev(apart) / len(apart) ** 0.5
    return {"guidance": scale, "from": interval[0], "to": interval[1], "pictures": len(apart), "steps": steps,
            "forwards_per_evaluation": 2 * forwards["interval"] / forwards["everywhere"],
            "everywhere": statistics.fmean(right["everywhere"]), "interval": statistics.fmean(right["interval"]),
            "difference": centre, "low": centre - margin, "high": centre + margin}  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- settings


def random_model(name: str, device: str) -> artifact.Model:
    """The named network with random weights, none of them initialised to zero."""
    config = replace(NAMED[name], zero_init=False)
    recipe = Recipe(name=name, data=Shards(size=SIZES[name]), model=config, objective=EDM())
    if device == "cuda":
        set_up(SAMPLING, choose(SAMPLING))  # as load() does
    torch.manual_seed(0)
    network = Network(config.build(), []).eval().requires_grad_(False).to(device)
    return artifact.Model(network, recipe.objective, Facts(), recipe)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run's folder or its ema.safetensors, trained on text")
    parser.add_argument("--network", choices=list(NAMED), help="random weights in this network")
    parser.add_argument(
        "--batch", type=int, nargs="+", help="images per batch (default: 1 4 64 on a GPU, 1 2 on a CPU)"
    )
    parser.add_argument(
        "--steps", type=int, help="Heun steps (default: 18 on a GPU, 3 on a CPU; 18 for --quality and --confirm)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--interval", type=float, nargs=2, default=(0.3, 3.0), metavar=("LOW", "HIGH"), help="in sigma")
    parser.add_argument("--quality", action="store_true", help="sweep intervals on a run of the captioned shapes")
    parser.add_argument("--per-caption", type=int, default=2, help="pictures per caption for --quality and --confirm")
    parser.add_argument(
        "--confirm", action="store_true", help="only compare --interval with guidance everywhere, on a run"
    )
    parser.add_argument("--json", type=Path, help="where the result goes (default: bench/results/)")
    return parser.parse_args()


def model_of(asked: argparse.Namespace, device: str) -> artifact.Model:
    if (asked.quality or asked.confirm) and asked.run is None:
        raise Refused("--quality and --confirm need a trained model, whose pictures' colours they read: give its --run")
    if asked.run is None:
        model = random_model(asked.network or ("reference" if device == "cuda" else "small"), device)
    else:
        model = artifact.load(asked.run, device)
        if set(model.network.conditioners) != {"text"}:
            raise Refused(
                f"{asked.run} is conditioned on {', '.join(model.network.conditioners) or 'nothing'}: give a run on text alone"
            )
    if device == "cuda" and not (asked.quality or asked.confirm):
        model.network.to(torch.bfloat16)
    return model


def confirm(model: artifact.Model, asked: argparse.Namespace, path: Path) -> None:
    found = confirmed(model, asked.guidance, tuple(asked.interval), asked.steps or 18, asked.per_caption)
    print("\n" + table([found]))
    write_json(path, {"machine": machine(), "command": command(), "confirmed": found})
    print(f"written: {path}")


def name_of(asked: argparse.Namespace, model: artifact.Model) -> str:
    """The result's name: a chosen network or run, --quality and --confirm have names of their own."""
    if asked.confirm or asked.quality:
        return "interval" if asked.confirm else "guidance"
    return f"sampling_{asked.network or model.recipe.name}" if asked.network or asked.run else "sampling"


def main() -> None:
    asked = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes, steps = (
        asked.batch or ([1, 4, 64] if device == "cuda" else [1, 2]),
        asked.steps or (18 if device == "cuda" else 3),
    )
    if min(*sizes, steps if asked.steps is None else asked.steps, asked.rounds, asked.per_caption) < 1:
        refuse("--batch, --steps, --rounds and --per-caption must be at least 1")
    if not 0 <= asked.interval[0] < asked.interval[1]:
        refuse(f"--interval {asked.interval[0]:g} {asked.interval[1]:g}: LOW must be at least 0, and below HIGH")
    try:
        model = model_of(asked, device)
        path = result_path(asked.json, name_of(asked, model))
        if asked.confirm:
            confirm(model, asked, path)
            return
        result = {"machine": machine(), "command": command(), "network": model.recipe.name, "size": model.size, "steps": steps,
                  "dtype": str(model.network.dtype).removeprefix("torch."), "clock": "wall" if device == "cuda" else "processor time"}  # fmt: skip
        rows, load = [], load_average()
        for images in sizes:
            chosen = ways(asked.guidance, tuple(asked.interval))
            rows += compare(job_of(model, images, steps), chosen, asked.rounds)
            result |= {"results": rows, "load_average": [load, load_average()]}
            write_json(path, result)
    except Refused as refusal:
        refuse(str(refusal))
    flat = [row | {"milliseconds_per_image": row["milliseconds_per_image"]["median"]} for row in rows]
    print(table([{k.replace("_", " "): v for k, v in row.items()} for row in flat]) + "\n")
    if asked.quality:
        sweep = quality(model, asked.guidance, asked.steps or 18, asked.per_caption)
        result |= {"quality": sweep, "verdict": verdict(sweep)}
        write_json(path, result)
        print(f"\n{result['verdict']}")
    print(f"written: {path}")


if __name__ == "__main__":
    main()
