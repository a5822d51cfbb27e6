"""The rules of guidance by name; "plain" is none of them."""

from duotone.data.refusal import Refused
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus

RULES = {"plain": None, "apg": Apg(), "cfg++": CfgPlusPlus()}


def rule_named(name: str) -> Apg | CfgPlusPlus | None:
    """Raises Refused on a name that no rule has."""
    if name not in RULES:
        raise Refused(f"rule {name!r} is unknown: there are {', '.join(RULES)}")
    return RULES[name]
