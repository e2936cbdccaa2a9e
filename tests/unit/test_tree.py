"""The tree stays readable: small files, functions that fit a screen, empty package files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("services", "clients", "protos", "tests", "infra")
GENERATED = ("_pb2.py", "_pb2_grpc.py")
LONGEST_FILE = 400
LONGEST_FUNCTION = 60


def python_files() -> Iterator[Path]:
    for top in SOURCES:
        for path in sorted((ROOT / top).rglob("*.py")):
            if not path.name.endswith(GENERATED) and "build" not in path.relative_to(ROOT).parts:
                yield path


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names of a file's functions and methods with their lines, decorators and docstrings included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - first + 1


def test_it_looks_at_the_tree() -> None:
    names = {str(path.relative_to(ROOT)) for path in python_files()}
    assert {"services/config.py", "protos/generate.py", "tests/unit/test_tree.py"} <= names
    assert {"python_files", "functions"} <= {name for name, _ in functions(Path(__file__))}


def test_files_are_of_one_concern() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in python_files()}
    assert {name: count for name, count in lines.items() if count > LONGEST_FILE} == {}


def test_functions_fit_a_screen() -> None:
    long = {
        f"{path.relative_to(ROOT)}: {name}": count
        for path in python_files()
        for name, count in functions(path)
        if count > LONGEST_FUNCTION
    }
    assert long == {}


def test_package_files_are_empty() -> None:
    """What a package offers is imported from the module that has it; only the client has a front door."""
    with_content = [path for path in python_files() if path.name == "__init__.py" and path.read_text().strip()]
    assert [path for path in with_content if path != ROOT / "clients/python/fermata/__init__.py"] == []
