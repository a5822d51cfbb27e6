"""The samplers by name."""

from collections.abc import Callable

from duotone.data.refusal import Refused
from duotone.engine.sampling.samplers.ancestral import ancestral
from duotone.engine.sampling.samplers.dpmpp_2m import dpmpp_2m
from duotone.engine.sampling.samplers.euler import euler
from duotone.engine.sampling.samplers.heun import heun
from duotone.engine.sampling.samplers.stochastic_heun import stochastic_heun

SAMPLERS = {f.__name__: f for f in (euler, heun, dpmpp_2m, ancestral, stochastic_heun)}


def solver_named(name: str) -> Callable:
    """The sampler with this name; raises Refused on an unknown name."""
    if name not in SAMPLERS:
        raise Refused(f"sampler {name!r} is unknown: there are {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
