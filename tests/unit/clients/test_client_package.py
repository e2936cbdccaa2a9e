"""The distribution is light: what it declares, what it imports, and what a bare install of it brings."""

from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
import tomllib
import venv
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


@pytest.mark.slow
def test_fresh_install_is_light(tmp_path: Path) -> None:
    """`pip install ./clients/python` alone, in an environment of its own, from the package index."""
    # A copy, for a build leaves folders beside the sources that would find their way into the next one.
    source = shutil.copytree(
        CLIENT, tmp_path / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    )
    venv.create(tmp_path / "venv", with_pip=True)
    binaries = tmp_path / "venv" / "bin"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True, timeout=300
        ).stdout

    run(str(binaries / "pip"), "install", "--quiet", "--disable-pip-version-check", str(source))
    installed = json.loads(run(str(binaries / "pip"), "list", "--disable-pip-version-check", "--format=json"))
    names = {package["name"].lower().replace("_", "-") for package in installed} - {"pip", "setuptools", "wheel"}
    assert names == {"fermata-client", "grpcio", "protobuf", "googleapis-common-protos", "typing-extensions"}
    assert "resume" in run(str(binaries / "fermata"), "--help")
    assert run(str(binaries / "python"), "-c", "import fermata; print(fermata.Client.__name__)") == "Client\n"
