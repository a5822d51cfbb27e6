"""Every check, in the order in which a run would get to its subject; each is a generator of findings in this folder."""

from collections.abc import Iterator

from duotone.engine.doctor import conditions, machine, network, noise, settings
from duotone.engine.doctor.patient import Finding, Patient
from duotone.engine.recipe import Recipe

CHECKS = (*settings.CHECKS, *noise.CHECKS, *conditions.CHECKS, *network.CHECKS, *machine.CHECKS)


def examine(recipe: Recipe) -> Iterator[Finding]:
    """Yields every finding of every check."""
    patient = Patient(recipe)
    for check in CHECKS:
        yield from check(patient)
