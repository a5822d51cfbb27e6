"""The import picture of CONTRIBUTING.md, read from the code."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT = {
    "kernels": set(),
    "data": set(),
    "engine": {"kernels", "data"},
    "recipes": {"engine", "data"},
    "bench": {"engine", "kernels", "data", "recipes"},
}
ONLY_IN = {
    "deepspeed": ["engine/zero.py"],
    "nvidia": ["data/dali.py", "bench/"],
    "triton": ["kernels/", "bench/"],
    "xformers": ["kernels/attention.py", "bench/"],
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


def test_leaves_are_namespace_folders():
    assert not (ROOT / "kernels" / "__init__.py").exists() and not (ROOT / "data" / "__init__.py").exists()


def test_recipes_are_data():
    """Imports, assignments and the two lines that start it: no function, class, loop or condition of their own."""
    for path in (ROOT / "recipes").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            ok = isinstance(node, ast.Import | ast.ImportFrom | ast.Assign | ast.Expr)
            starts = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
            assert ok or starts, f"{path.name}:{node.lineno}"
