"""`python -m tests.bench.peers.gguf_file FOLDER FILE TYPE`: a bfloat16 checkpoint as the file that llama.cpp reads.

Runs in llama.cpp's environment, with the package `gguf` of that project. The file has no vocabulary: ids go in and
come out. TYPE is that of the matrices: f32, bf16 or q8_0; vectors are float32 in all.
"""

from __future__ import annotations

import importlib
import json
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}

Array = Any


def tensors(path: Path) -> Iterator[tuple[str, Array]]:
    """The tensors of a safetensors file in bfloat16, as float32 arrays."""
    numpy: Any = importlib.import_module("numpy")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] != "BF16":
                raise ValueError(f"{path}: {name} is {entry['dtype']}, not BF16")
            begin, end = (start + offset for offset in entry["data_offsets"])
            halves = numpy.frombuffer(content[begin:end], dtype=numpy.uint16).astype(numpy.uint32)
            yield name, (halves << 16).view(numpy.float32).reshape(entry["shape"])


def renamed(name: str, model_type: str, heads: dict[str, int], array: Array) -> tuple[str, Array]:
    """A tensor by its name in the file; in Llama's queries and keys, the two halves of a head turn into pairs."""
    if name in WHOLE:
        return WHOLE[name], array
    _, _, layer, rest = name.split(".", 3)
    module, kind = rest.rsplit(".", 1)
    target = NAMES[module]
    if model_type == "llama" and target in heads:
        shape = (heads[target], 2, array.shape[0] // heads[target] // 2, *array.shape[1:])
        array = array.reshape(shape).swapaxes(1, 2).reshape(array.shape)
    return f"blk.{layer}.{target}.{kind}", array


def write(folder: Path, path: Path, kind: str) -> None:
    """Writes the file."""
    gguf: Any = importlib.import_module("gguf")
    numpy: Any = importlib.import_module("numpy")
    config = json.loads((folder / "config.json").read_text())
    quantization = gguf.GGMLQuantizationType[kind.upper()]
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(path, config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // heads["attn_q"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for source, values in tensors(folder / "model.safetensors"):
        name, array = renamed(source, config["model_type"], heads, values)
        if array.ndim == 1:
            writer.add_tensor(name, numpy.ascontiguousarray(array))
        else:
            writer.add_tensor(name, gguf.quants.quantize(array, quantization), raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
