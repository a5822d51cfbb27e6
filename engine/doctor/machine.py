"""What this machine runs instead of the fast path, and what would enable that."""

from collections.abc import Iterator

from duotone.data.refusal import Refused
from duotone.engine import speed
from duotone.engine.distributed import zero
from duotone.engine.doctor.patient import Finding, Patient
from duotone.kernels.attention_backends import xformers


def device(patient: Patient) -> Iterator[Finding]:
    choice = speed.choose(patient.recipe.speed, patient.recipe.zero.stage)
    lines = speed.substitutions(patient.recipe.speed, choice)
    yield Finding("fine", "device", f"{choice.device}, {choice.precision}{', compiled' if choice.compile else ''}")
    for line in lines:
        yield Finding("warning", "device", line)
    if choice.precision == "fp16":
        try:
            zero.refuse_precision(choice.precision)
        except Refused as refusal:
            yield Finding("fault", "speed.precision", str(refusal))


def attention(patient: Patient) -> Iterator[Finding]:
    """Warns if xformers cannot run here, with the reason."""
    if speed.choose(patient.recipe.speed).device == "cuda" and (why := xformers()[1]):
        yield Finding("warning", "xformers", why)


def decoder(patient: Patient) -> Iterator[Finding]:
    if patient.data is None:
        yield Finding("unknown", "data", "no --data.shards: classes, captions and decoder were not examined")
        return
    yield Finding("fine", "data", f"{patient.data.count:,} samples, decoded by {patient.data.decoder}")
    for line in (patient.data.decoder_note, *patient.data.notes):
        if line:
            yield Finding("warning", "data", line)


CHECKS = (device, attention, decoder)
