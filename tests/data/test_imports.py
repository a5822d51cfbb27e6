"""What data/ may import, and the calls it never makes, read from its source."""

import ast
from pathlib import Path

import duotone.data.batch

FOLDER = Path(duotone.data.batch.__file__).parent
SOURCES = sorted(FOLDER.rglob("*.py"))
ONLY_IN = {"nvidia": {"dali.py"}, "pickle": {"cifar10.py"}}
NEVER = {"eval", "exec", "compile", "__import__", "extractall", "extract", "system", "literal_eval", "Popen"}


def trees():
    return [(path, ast.parse(path.read_text())) for path in SOURCES]


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module


def test_data_is_a_leaf():
    assert len(SOURCES) > 15
    for path, tree in trees():
        names = list(imported(tree))
        assert not [name for name in names if name.startswith(("duotone.engine", "duotone.kernels"))], path
        for package, files in ONLY_IN.items():
            assert package not in {name.partition(".")[0] for name in names} or path.name in files, path


def test_heavy_packages_are_imported_where_they_are_used():
    for path, tree in trees():
        outermost = {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        assert not outermost & {"webdataset", "duotone.data.dali"}, path


def test_calls_that_are_never_made():
    for path, tree in trees():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            function = call.func
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = getattr(getattr(function, "value", None), "id", "")
            assert name not in NEVER or (owner, name) == ("re", "compile"), f"{path}:{call.lineno}"
            assert (owner, name) not in {("torch", "load"), ("np", "load"), ("pickle", "load"), ("pickle", "loads")}
            assert not [keyword for keyword in call.keywords if keyword.arg == "shell"], f"{path}:{call.lineno}"


def test_folders_are_namespaces():
    assert not list(FOLDER.rglob("__init__.py"))
