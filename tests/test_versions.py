"""The versions of libraries: what setup.py admits is what the two lists of constraints have been tested with."""

from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools._distutils.core import run_setup

ROOT = Path(__file__).parent.parent


def pinned(file: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / file).read_text().splitlines() if not line.startswith("#")]
    return {name: Version(version) for name, version in (line.split("==") for line in lines)}


@pytest.fixture
def admitted(monkeypatch) -> list[Requirement]:
    monkeypatch.chdir(ROOT)
    package = run_setup("setup.py", stop_after="init")
    return [Requirement(text) for text in package.install_requires + package.extras_require["dev"]]


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
