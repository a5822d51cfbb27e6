"""The network itself: layers through which an image's prediction would depend on the other images of its batch."""

from collections.abc import Iterator

from torch.nn.modules.batchnorm import _BatchNorm

from duotone.engine.doctor.patient import Finding, Patient


def batch_statistics(patient: Patient) -> Iterator[Finding]:
    """Looks for batch statistics: guided sampling puts both branches into one batch, so these would mix them."""
    named = {**dict(patient.unet.named_modules()), **built_modules(patient)}
    found = [name for name, module in named.items() if isinstance(module, _BatchNorm)]
    if found:
        more = f" and {len(found) - 1} more normalise" if found[1:] else " normalises"
        says = f"{found[0]}{more} over the batch, which mixes the conditional and the unconditional branch of guidance: use group normalisation"
        yield Finding("fault", "network", says)
    else:
        yield Finding("fine", "network", "no layer looks across the images of a batch")


def built_modules(patient: Patient) -> dict:
    built, _ = patient.conditioners
    return {f"{kind}.{name}": module for kind, c in built.items() for name, module in c.named_modules()}


CHECKS = (batch_statistics,)
