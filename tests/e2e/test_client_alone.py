"""`pip install ./clients/python` alone is enough to generate, and brings little (row B11)."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.system import UpSystem

pytestmark = pytest.mark.timeout(240)

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
from fermata import Client
with Client(sys.argv[1]) as client:
    result = client.generate("hello", temperature=0.0, max_tokens=5, ignore_eos=True)
print(len(result.choices[0].token_ids), not {"torch", "ray", "services", "numpy", "redis"} & set(sys.modules))
"""


def test_the_light_client_in_an_environment_of_its_own(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    python = environment / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    # A copy, for a build leaves folders beside the sources that would find their way into the next one.
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    source = shutil.copytree(ROOT / "clients" / "python", tmp_path / "source", ignore=ignored)
    client = ["-c", str(ROOT / "constraints.txt"), str(source)]
    subprocess.run([*pip, "install", "-q", *client], check=True)
    listed = subprocess.run([*pip, "list", "--format=json"], capture_output=True, text=True, check=True).stdout
    installed = {item["name"].lower().replace("_", "-") for item in json.loads(listed)}
    tools = {"pip", "setuptools", "wheel"}
    assert installed - tools == {
        "fermata-client",
        "grpcio",
        "protobuf",
        "googleapis-common-protos",
        "typing-extensions",
    }
    with UpSystem(tmp_path / "state") as system:
        by_program = subprocess.run(
            [python, "-c", PROGRAM, system.address], capture_output=True, text=True, cwd=tmp_path, check=False
        )
        assert by_program.stdout.split() == ["5", "True"], by_program.stderr
        by_command = subprocess.run(
            [environment / "bin" / "fermata", "generate", "hello", "--max-tokens", "5", "--server", system.address],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert by_command.returncode == 0, by_command.stderr
