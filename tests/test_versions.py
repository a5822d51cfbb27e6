"""The versions of libraries: what setup.py admits is what the two lists of constraints have been tested with."""

import sysconfig
from importlib.metadata import distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parent.parent


def pinned(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.fixture
def admitted() -> list[Requirement]:
    """What the installed package requires; an older list may lie beside setup.py."""
    (package,) = distributions(name="duotone", path=[sysconfig.get_path("purelib")])
    return [Requirement(text) for text in package.requires]


def test_the_oldest_version_admitted_is_one_that_is_tested(admitted):
    oldest = pinned("constraints-oldest.txt")
    floors = {each.name: Version(s.version) for each in admitted for s in each.specifier if s.operator == ">="}
    assert len(floors) == len(admitted) > 15
    assert floors == {name: oldest[name] for name in floors}


@pytest.mark.parametrize("file", ["constraints.txt", "constraints-oldest.txt"])
def test_what_is_pinned_is_admitted(file, admitted):
    versions = pinned(file)
    for each in admitted:
        assert each.name not in versions or versions[each.name] in each.specifier, each
