"""Noise levels that are sampled but never trained, and a sigma_data that is not the data's."""

from collections.abc import Iterator

import torch

from duotone.engine.doctor.examination import Finding, Patient
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.sigma_data import measured_sigma_data

DRAWS = 1_000_000
TOLERATED = 0.05
RARE = 1e-7  # the published EDM draws 3e-6 of its levels at or above the second of 50 that it samples


def trained_levels(patient: Patient) -> Iterator[Finding]:
    """Every level of a table is drawn; of a continuous range, where sampling begins and ends is not beyond what is drawn."""
    objective = patient.recipe.objective
    u_N = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    sigma_N = objective.draw_sigma(u_N)
    if isinstance(objective, DDPM):
        yield from of_table(objective.sigmas, sigma_N)
    else:
        yield from of_range(objective, sigma_N)


def of_table(sigmas: torch.Tensor, drawn_N: torch.Tensor) -> Iterator[Finding]:
    missing = (~torch.isin(sigmas, drawn_N.unique())).nonzero().flatten().tolist()
    if missing:
        listed = ", ".join(map(str, missing[:5])) + (" ..." if len(missing) > 5 else "")
        says = f"{len(missing)} of {len(sigmas)} timesteps are never trained (t = {listed})"
        last = ", the last one, where sampling begins, among them" if len(sigmas) - 1 in missing else ""
        yield Finding("fault", "timesteps", says + last)
    else:
        yield Finding("fine", "timesteps", f"all {len(sigmas)} are trained")


def of_range(objective, drawn_N: torch.Tensor) -> Iterator[Finding]:
    visited = objective.sampling_sigmas(50, objective.spacings[0])
    inner = visited[(visited > 0) & visited.isfinite()]
    above = float((drawn_N >= inner[1]).double().mean())
    if above < RARE:
        says = f"sampling visits sigma = {inner[1]:.3g}, at or above which training draws {above:.1g} of its levels"
        yield Finding("warning", "noise levels", says)
    else:
        yield Finding("fine", "noise levels", "training draws levels wherever sampling goes")


def sigma_data(patient: Patient) -> Iterator[Finding]:
    """Karras et al. 2022 scale by the standard deviation of the pixels: measured here."""
    objective = patient.recipe.objective
    if not isinstance(objective, EDM):
        return
    if objective.sigma_data is None:
        yield Finding("fine", "objective.sigma_data", "is measured when the run begins")
    elif patient.data is None:
        yield Finding(
            "unknown", "objective.sigma_data", f"{objective.sigma_data:g}; give --data.shards to have it measured"
        )
    else:
        measured = measured_sigma_data(patient.data, images=1000)
        off = abs(objective.sigma_data / measured - 1) > TOLERATED
        says = f"{objective.sigma_data:g}, measured {measured:.3f}" + ("; none measures it at the start" if off else "")
        yield Finding("warning" if off else "fine", "objective.sigma_data", says)


CHECKS = (trained_levels, sigma_data)
