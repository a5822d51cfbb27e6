"""The import graph of CONTRIBUTING.md, checked against the code."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "engine": {"kernels", "data"},
    "recipes": {"engine", "data"},
    "bench": {"engine", "kernels", "data", "recipes"},
}
ONLY_IN = {
    "deepspeed": ["engine/distributed/zero.py"],
    "nvidia": ["data/dali.py", "bench/"],
    "triton": ["kernels/", "bench/"],
    "xformers": ["kernels/attention_backends.py", "bench/"],
}


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_only_what_the_picture_shows(folder):
    files = list((ROOT / folder).rglob("*.py"))
    assert files
    for path in files:
        folders = {name.split(".")[1] for name in imported(path) if name.startswith("duotone.")}
        assert folders <= MAY_IMPORT[folder] | {folder}, path


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_in_one_place(library):
    for folder in MAY_IMPORT:
        for path in (ROOT / folder).rglob("*.py"):
            place = path.relative_to(ROOT).as_posix()
            uses = any(name.split(".")[0] == library for name in imported(path))
            assert not uses or place.startswith(tuple(ONLY_IN[library])), place


def modules_imported(path: Path, modules: set[str]) -> set[str]:
    """The project's own modules that a file imports, also within functions and for type checkers."""
    return {part for name in imported(path) for part in (name, name.rpartition(".")[0]) if part in modules}


def test_no_files_import_each_other_in_a_circle():
    """The module that defines a name is below those that use it; `__init__.py`, which only re-exports, is above all."""
    paths = [path for folder in ("engine", "kernels", "data") for path in (ROOT / folder).rglob("*.py")]
    modules = {f"duotone.{path.relative_to(ROOT).with_suffix('').as_posix().replace('/', '.')}": path for path in paths}
    waiting = {name: modules_imported(path, set(modules)) - {name} for name, path in modules.items()}
    assert sum(map(len, waiting.values())) > 300
    while free := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"these stand in circles, or above one: {', '.join(sorted(waiting))}"


def test_leaves_are_namespace_folders():
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "data" / "__init__.py").exists()


def test_recipes_are_data():
    """They hold imports, assignments and the two lines that start a run, but no function, class, loop or condition."""
    for path in (ROOT / "recipes").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            ok = isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
            starts = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            assert ok or starts, f"{path.name}:{node.lineno}"


def test_commands_answer_without_torch():
    """Usage, a wrong command and the flags of `prepare` are answered at once: torch alone takes seconds to load."""
    code = (
        "import sys; from duotone.engine import cli; cli.main(['prepare', '--help']); assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="kernels for a GPU are registered with the compiler")
def test_without_cuda_the_engine_leaves_the_compiler_alone():
    """It would take half of the time in which a command answers."""
    code = "import sys; import duotone.engine.run, duotone.engine.sample; assert 'torch._dynamo' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_public_function_comes_before_the_file_of_its_name():
    """`engine.sample` is the function and not the module, whichever is imported first."""
    code = "import duotone.engine.sample, duotone.engine as e; from duotone.engine import *; from duotone.engine import train; "
    code += "assert callable(e.sample) and e.sample is sample and callable(train)"
    code += "; assert [name for name in e.__all__ if not callable(getattr(e, name))] == []"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
