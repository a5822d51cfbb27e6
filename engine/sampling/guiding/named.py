"""The guidance rules by name; "plain" means no rule."""

from duotone.data.refusal import Refused
from duotone.engine.sampling.guiding.apg import Apg
from duotone.engine.sampling.guiding.cfg_plus_plus import CfgPlusPlus

RULES = {"plain": None, "apg": Apg(), "cfg++": CfgPlusPlus()}


def rule_named(name: str) -> Apg | CfgPlusPlus | None:
    """The rule with this name, None for "plain"; raises Refused on an unknown name."""
    if name not in RULES:
        raise Refused(f"rule {name!r} is unknown: there are {', '.join(RULES)}")
    return RULES[name]
