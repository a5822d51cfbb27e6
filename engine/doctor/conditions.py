"""Conditions as the network gets them: how often each is null, whether it carries information, what guidance can do.

N rows; the ports are described in engine/conditioning/base.py.
"""

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor

from duotone.data.batch import Batch
from duotone.engine.conditioning.base import Conditioner, Conditioning
from duotone.engine.conditioning.dropout import conditioned
from duotone.engine.conditioning.label import Label
from duotone.engine.doctor.patient import ROWS, Finding, Patient

PART = 16  # rows at a time: the tokens of all rows would fill gigabytes


@torch.no_grad()
def drop_rates(patient: Patient) -> Iterator[Finding]:
    """Compares how many rows reach the network as the null condition, counted there, with what is configured."""
    recipe, measurable = patient.recipe, patient.measurable
    for kind, why in patient.conditioners[1].items():
        if kind in measurable:
            yield Finding("unknown", f"{kind}.encoder", f"was not examined, and is replaced by a stand-in below: {why}")
        else:
            yield Finding("unknown", f"{kind}.dropout", f"not measured: {why}")
    flip_N = torch.zeros(ROWS, dtype=torch.bool)
    _, keep = conditioned(measurable, patient.batch, recipe.seed, flip_N, recipe.drop_together)
    for kind, conditioner in measurable.items():
        if kind == "temperature":
            continue
        # Whole conditions only: making attributes unknown one by one has its own setting.
        null_N = is_null(conditioner, conditioner.of_batch_whole(patient.batch, recipe.seed), keep[kind])
        yield rate(kind, conditioner.dropout, recipe.drop_together, float(null_N.double().mean()))


def rate(kind: str, dropout: float, together: float, measured: float) -> Finding:
    wanted = 1 - (1 - dropout) * (1 - together)
    noise = 4 * (wanted * (1 - wanted) / ROWS) ** 0.5 + 0.01
    says = f"configured {wanted:.1%}, measured at the network's input {measured:.1%} of {ROWS:,} rows"
    return Finding("fault" if abs(measured - wanted) > noise else "fine", f"{kind}.dropout", says)


def is_null(conditioner: Conditioner, tensors: dict[str, Tensor], keep_N: Tensor) -> Tensor:
    """Which rows give the network exactly what a dropped row would."""
    parts = {name: tensor.split(PART) for name, tensor in tensors.items()}
    found = []
    for i, part_N in enumerate(keep_N.split(PART)):
        found.append(is_null_in_part(conditioner, {name: part[i] for name, part in parts.items()}, part_N))
    return torch.cat(found)


def is_null_in_part(conditioner: Conditioner, tensors: dict[str, Tensor], keep_N: Tensor) -> Tensor:
    given, null = conditioner(tensors, keep_N), conditioner(tensors, torch.zeros_like(keep_N))
    same_N = torch.ones_like(keep_N)
    for a, b in pairs(given, null):
        same_N &= (a == b).expand(len(keep_N), *a.shape[1:]).flatten(1).all(1)
    return same_N


def pairs(one: Conditioning, other: Conditioning) -> Iterator[tuple[Tensor, Tensor]]:
    for field in fields(Conditioning):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if a is not None:
            yield a, b


@torch.no_grad()
def says_something(patient: Patient) -> Iterator[Finding]:
    """Checks that samples that differ in a condition also differ at the network's input."""
    for kind, conditioner in patient.measurable.items():
        if kind == "temperature" or not differs(patient.batch, kind):
            continue
        tensors = {name: tensor[:16] for name, tensor in conditioner.of_batch(patient.batch).items()}
        given = conditioner(tensors, torch.ones(16, dtype=torch.bool))
        if given.tokens_NMD is not None and not patient.recipe.model.reads_tokens:
            yield Finding(
                "fault",
                kind,
                "gives the network tokens, but no level reads them: set model.attention or model.middle to cross",
            )
        elif all((a == a[:1]).all() for a, _ in pairs(given, given)):
            yield Finding("fault", kind, "every sample gives the network the same input: the condition says nothing")
        elif kind in patient.conditioners[1]:
            yield Finding(
                "unknown", kind, "samples that differ in it differ at the network's input, but with a stand-in's tokens"
            )
        else:
            yield Finding("fine", kind, "samples that differ in it differ at the network's input")


@torch.no_grad()
def draws_by_position(patient: Patient) -> Iterator[Finding]:
    """Checks that a batch is the same when drawn twice, as resuming and another number of ranks require."""
    for kind, conditioner in patient.measurable.items():
        once, again = (conditioner.of_batch(patient.batch, patient.recipe.seed) for _ in range(2))
        if any(not tensor.equal(again[name]) for name, tensor in once.items()):
            says = "the same batch differs when drawn again, so a resumed run would not be the same: draw by engine/draws.py"
            yield Finding("fault", f"{kind}.of_batch", says)


def differs(batch: Batch, kind: str) -> bool:
    """Whether the batch's first rows differ in what this kind of condition reads."""
    if kind in ("label", "class_map"):
        return len(batch.labels_N[:16].unique()) > 1
    if kind == "attributes":
        return len(batch.attributes_NK[:16].unique(dim=0)) > 1
    return "text" not in kind or len(set(batch.captions[:16])) > 1


def sinusoids(patient: Patient) -> Iterator[Finding]:
    """Warns if class numbers, which are names, are encoded as quantities."""
    for condition in patient.recipe.conditioning:
        if isinstance(condition, Label) and condition.encoding == "sinusoid":
            says = "the class number is fed as a sinusoid, as if class 3 lay between 2 and 4; embedding learns each by itself"
            yield Finding("warning", "label.encoding", says)


def guidance(patient: Patient) -> Iterator[Finding]:
    """Checks what guidance needs: the null condition, from which it leads away, is trained by dropout only."""
    recipe = patient.recipe
    asked = {c.kind: c.dropout for c in recipe.conditioning if c.kind != "temperature"}
    guided = any(c.kind == "temperature" for c in recipe.conditioning)
    if not asked or guided:
        return
    never = [kind for kind, dropout in asked.items() if dropout == 0 and recipe.drop_together == 0]
    if never and recipe.preview.guidance != 1:
        says = (
            f"{recipe.preview.guidance:g} is set, but {', '.join(never)} is never dropped, so there is no trained null condition "
            "to guide away from: previews are drawn at 1, and sampling with guidance is refused"
        )
        yield Finding("fault", "preview.guidance", says)
    elif never:
        yield Finding("warning", "dropout", f"{', '.join(never)} is never dropped: guidance will not be possible")
    elif recipe.preview.guidance == 1:
        says = (
            "is 1: pictures are drawn unguided, although guidance is trained for, since every condition is sometimes dropped; "
            "give a scale above 1, here and to duotone sample"
        )
        yield Finding("warning", "preview.guidance", says)
    else:
        yield Finding("fine", "guidance", "every condition has a trained null condition")


CHECKS = (drop_rates, says_something, draws_by_position, sinusoids, guidance)
