"""The distribution is light: what it declares, what it imports, and what a bare install of it brings."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

CLIENT = Path(__file__).resolve().parents[3] / "clients" / "python"
ALLOWED = {"grpc", "google", "fermata"}


def test_declared_dependencies() -> None:
    project = tomllib.loads((CLIENT / "pyproject.toml").read_text())["project"]
    names = {requirement.partition(">")[0].strip() for requirement in project["dependencies"]}
    assert names == {"grpcio", "protobuf", "googleapis-common-protos"}
    assert not project.get("optional-dependencies")
    assert project["scripts"] == {"fermata": "fermata.cli:main"}


@pytest.mark.parametrize("path", sorted((CLIENT / "fermata").glob("*.py")), ids=lambda path: path.name)
def test_nothing_else_is_imported(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add((node.module or "").partition(".")[0])
    assert imported - sys.stdlib_module_names <= ALLOWED


def test_import_loads_nothing_heavy() -> None:
    code = "import sys, fermata, fermata.cli; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "ray", "numpy", "redis", "services", "tokenizers", "transformers"} & set(loaded)
