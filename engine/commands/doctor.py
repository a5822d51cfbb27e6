"""`duotone doctor RECIPE`: what is wrong with a recipe before it costs a run."""

import os
import sys
from pathlib import Path

MARKS = {"fault": "FAULT", "warning": "warning", "fine": "ok", "unknown": "-"}


def run(path: Path, flags: list[str]) -> None:
    """Prints every finding; exits with code 1 if any is a fault."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a missing text encoder is a finding, not a download
    from duotone.engine.doctor.examination import examine
    from duotone.engine.recipe_file import recipe_at

    recipe = recipe_at(path, flags, "duotone doctor RECIPE")
    findings = []
    for finding in examine(recipe):
        findings.append(finding)
        print(f"{MARKS[finding.level]:8} {finding.subject}: {finding.says}", flush=True)
    faults = sum(finding.level == "fault" for finding in findings)
    warnings = sum(finding.level == "warning" for finding in findings)
    print(f"{recipe.name}: {faults} faults, {warnings} warnings")
    sys.exit(1 if faults else 0)
