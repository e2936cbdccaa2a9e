"""Generates the Python stubs of all protos, with types, next to the code that imports them.

`python protos/generate.py` writes them; `--check` writes them to a temporary folder and fails when the
committed ones differ; `--lint` runs buf's STANDARD rules over the descriptors. Knows paths and protoc only.
"""

from __future__ import annotations

import argparse
import filecmp
import shutil
import site
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
BIN = Path(sys.executable).parent

# Proto path = Python import path: each top folder has one output root.
OUTPUT_ROOTS = {"fermata": Path("clients/python"), "services": Path()}
SUFFIXES = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def protoc(*arguments: str) -> None:
    """Runs grpcio-tools' protoc with googleapis-common-protos on its path."""
    include = next(path for path in site.getsitepackages() if (Path(path) / "google/rpc/status.proto").exists())
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(PROTOS), "-I", include, *arguments]
    subprocess.run(command, check=True)


def proto_files(top: str) -> list[str]:
    """Paths of one top folder's protos, relative to `protos/`."""
    return sorted(str(path.relative_to(PROTOS)) for path in (PROTOS / top).rglob("*.proto"))


def generate(root: Path) -> list[Path]:
    """Writes all stubs under `root`; returns their paths relative to it."""
    written = []
    for top, output_root in OUTPUT_ROOTS.items():
        output = root / output_root
        output.mkdir(parents=True, exist_ok=True)
        with_services = [name for name in proto_files(top) if "\nservice " in (PROTOS / name).read_text()]
        protoc(
            f"--plugin=protoc-gen-mypy={BIN / 'protoc-gen-mypy'}",
            f"--python_out={output}",
            f"--mypy_out=quiet:{output}",
            *proto_files(top),
        )
        protoc(
            f"--plugin=protoc-gen-mypy_grpc={BIN / 'protoc-gen-mypy_grpc'}",
            f"--grpc_python_out={output}",
            f"--mypy_grpc_out=quiet:{output}",
            *with_services,
        )
        for name in proto_files(top):
            stem = name.removesuffix(".proto")
            written += [output_root / (stem + suffix) for suffix in SUFFIXES if (output / (stem + suffix)).exists()]
    return written


def check() -> int:
    """Returns 1 and names the files when committed stubs are not what the protos give."""
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        stale = [
            path
            for path in generate(fresh)
            if not (ROOT / path).exists() or not filecmp.cmp(fresh / path, ROOT / path, shallow=False)
        ]
    for path in stale:
        print(f"stale: {path} (run `make protos`)", file=sys.stderr)
    return 1 if stale else 0


def lint() -> int:
    """Runs `buf lint`; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder) / "image.binpb"
        files = [name for top in OUTPUT_ROOTS for name in proto_files(top)]
        protoc("--include_imports", "--include_source_info", "-o", str(image), *files)
        buf = shutil.which("buf", path=str(BIN)) or "buf"
        return subprocess.run([buf, "lint", str(image), "--config", str(PROTOS / "buf.yaml")], check=False).returncode


def main() -> int:
    """Runs what the arguments ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="fail when the committed stubs are stale")
    parser.add_argument("--lint", action="store_true", help="run buf lint")
    arguments = parser.parse_args()
    if arguments.check or arguments.lint:
        return max(check() if arguments.check else 0, lint() if arguments.lint else 0)
    generate(ROOT)
    return 0


if __name__ == "__main__":
    sys.exit(main())
