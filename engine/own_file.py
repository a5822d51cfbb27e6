"""Imports a Python file by its path: a recipe, or a file with parts of one's own."""

import sys
from pathlib import Path
from types import ModuleType


def import_file(file: Path) -> ModuleType:
    """The module of a Python file, with its folder on sys.path as if it were run; raises whatever the file raises.

    It is compiled anew every time, since Python would take stored bytecode for a file that has just been edited.
    """
    file = file.resolve()
    module = ModuleType(f"duotone_file_{file.stem}")
    module.__file__ = str(file)
    sys.modules[module.__name__] = module  # where annotations that are strings are looked up
    if str(file.parent) not in sys.path:
        sys.path.insert(0, str(file.parent))
    exec(compile(file.read_bytes(), file, "exec"), vars(module))
    return module
