"""Every noise schedule as a picture: how much of the image is left at each time, and which noise levels training draws.

python bench/schedules.py                     # docs/schedules.png
python bench/schedules.py --out picture.png
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.backend_bases import FigureCanvasBase
from record import refuse, refuse_unwritable

from duotone.engine.objectives.ddpm import DDPM, alpha_bars
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.flow import Flow

SCHEDULES = ("linear", "scaled_linear", "cosine")
OBJECTIVES = {
    **{f"DDPM, {name}": DDPM(schedule=name) for name in SCHEDULES},
    "EDM (-1.2, 1.2)": EDM(),
    "flow, logit-normal": Flow(),
    "flow, uniform": Flow(times="uniform"),
}


def draw_signal(axes) -> None:
    for name in SCHEDULES:
        axes.plot(alpha_bars(name, 1000).sqrt(), label=name)
    axes.plot(1 - torch.arange(1000) / 1000, "--", color="gray", label="flow: 1 - t")
    axes.set(xlabel="timestep", ylabel="share of the image, sqrt(alpha-bar)", title="What is left of the image")
    axes.legend()


def draw_levels(axes) -> None:
    u_N = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    edges = torch.linspace(-6, 6, 121, dtype=torch.float64)
    for name, objective in OBJECTIVES.items():
        counts = torch.histogram(objective.draw_sigma(u_N).log().clamp(-6, 6), edges).hist
        axes.plot(edges[1:-2].exp(), counts[1:-1] / counts.sum() / (edges[1] - edges[0]), label=name)
    axes.set(
        xscale="log", xlabel="noise level sigma", ylabel="density over log sigma", title="Which levels training draws"
    )
    axes.legend()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "schedules.png")
    out = parser.parse_args().out
    if out.suffix.removeprefix(".") not in FigureCanvasBase.get_supported_filetypes():
        refuse(f"--out {out}: no picture can be written in this format; give a name that ends with .png, .svg or .pdf")
    refuse_unwritable(out, "--out")
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    draw_signal(left)
    draw_levels(right)
    figure.savefig(out, dpi=80)
    print(f"written: {out}")


if __name__ == "__main__":
    main()
