"""Noise levels that sampling uses but training never draws, and a sigma_data that is not the data's."""

from collections.abc import Iterator

import torch

from duotone.engine.doctor.patient import Finding, Patient
from duotone.engine.objectives.ddpm import DDPM
from duotone.engine.objectives.edm import EDM
from duotone.engine.objectives.sigma_data import measured_sigma_data

DRAWS = 1_000_000
TOLERATED = 0.05
STILL_SEEN = 0.1
RARE = 1e-7  # the published EDM draws 3e-6 of its levels at or above the second of its 50 sampling levels


def trained_levels(patient: Patient) -> Iterator[Finding]:
    """Checks that training draws every level of a table, or a range that reaches where sampling starts and ends."""
    objective = patient.recipe.objective
    u_N = (torch.arange(DRAWS, dtype=torch.float64) + 0.5) / DRAWS
    sigma_N = objective.draw_sigma(u_N)
    if isinstance(objective, DDPM):
        yield from of_table(objective.sigmas, sigma_N)
        yield from weightless(objective)
        yield from last_level(objective)
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
        yield Finding("fine", "timesteps", f"all {len(sigmas)} are drawn")


def weightless(objective: DDPM) -> Iterator[Finding]:
    """Warns of levels with loss weight 0, which are not trained: SNR weights give it to a last level without signal."""
    sigmas = objective.sigmas
    nothing = (objective.loss_weight(sigmas) == 0).nonzero().flatten().tolist()
    if nothing:
        listed = ", ".join(map(str, nothing[:5])) + (" ..." if len(nothing) > 5 else "")
        says = f"{objective.weighting} gives t = {listed} weight 0"
        last = ", where sampling begins" if len(sigmas) - 1 in nothing else ""
        yield Finding(
            "warning", "objective.weighting", f"{says}: it is drawn, but learned only from its neighbours{last}"
        )


def last_level(objective: DDPM) -> Iterator[Finding]:
    """Warns if a table's last level still holds signal, since sampling begins from pure noise."""
    signal = float(1 / (1 + objective.sigmas[-1].square()).sqrt())
    if signal > STILL_SEEN:
        says = (
            f"{objective.steps} levels of {objective.schedule} end where {signal:.0%} of the image is left, but sampling begins "
            "with nothing of it: pictures will be greyer than the data's; take 1000 levels, or schedule cosine"
        )
        yield Finding("warning", "objective.steps", says)


def of_range(objective, drawn_N: torch.Tensor) -> Iterator[Finding]:
    visited = objective.sampling_sigmas(50, objective.spacings[0])
    inner = visited[(visited > 0) & visited.isfinite()]
    above, below = (float(beyond.double().mean()) for beyond in (drawn_N >= inner[1], drawn_N <= inner[-2]))
    if above < RARE:
        says = f"sampling visits sigma = {inner[1]:.3g}, at or above which training draws {above:.1g} of its levels"
        yield Finding("warning", "noise levels", says)
    elif below < RARE:
        says = f"sampling visits sigma = {inner[-2]:.3g}, at or below which training draws {below:.1g} of its levels"
        yield Finding("warning", "noise levels", says)
    else:
        yield Finding("fine", "noise levels", "training draws levels wherever sampling goes")


def sigma_data(patient: Patient) -> Iterator[Finding]:
    """Compares sigma_data, by which Karras et al. 2022 scale, with the measured standard deviation of the pixels."""
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
