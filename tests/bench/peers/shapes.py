"""Models with random weights in the shapes of published ones: the same numbers for every engine, nothing downloaded.

`python -m tests.bench.peers.shapes NAME FOLDER bf16|fp32` writes a Hugging Face checkpoint with a tokenizer. The
weights of both precisions are equal: those of the second are the rounded ones of the first. Knows no engine.
"""

from __future__ import annotations

import argparse
import importlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILES_OF_TEXT = 1500
"""What the tokenizer is trained on: files of Python's own library."""

LOGIT_DEVIATION = 3.0
"""Standard deviation of the logits; that of trained models is 2 to 4."""

CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, named as in `config.json`, and what follows from them."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float

    @property
    def head_size(self) -> int:
        """Width of one head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, which is the head, too."""
        return self.vocab_size * self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers."""
        attention = 2 * self.hidden_size * (self.num_attention_heads + self.num_key_value_heads) * self.head_size
        return self.num_hidden_layers * (attention + 3 * self.hidden_size * self.intermediate_size)

    @property
    def kv_values(self) -> int:
        """Keys and values per position in all layers."""
        return 2 * self.num_hidden_layers * self.num_key_value_heads * self.head_size


SHAPES = {
    "smollm2-135m": Shape("llama", 49152, 576, 1536, 30, 9, 3, 8192, 1e-5, 100000.0),
    "qwen2.5-0.5b": Shape("qwen2", 151936, 896, 4864, 24, 14, 2, 32768, 1e-6, 1000000.0),
}


def write(shape: Shape, folder: Path, precision: str) -> None:
    """Writes a checkpoint with a tokenizer."""
    import torch

    transformers: Any = importlib.import_module("transformers")  # untyped
    config = transformers.AutoConfig.for_model(
        shape.model_type,
        **{name: value for name, value in vars(shape).items() if name not in ("model_type", "rope_theta")},
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                deviation = LOGIT_DEVIATION if "embed" in name else 1.0
                parameter.normal_(0.0, deviation * parameter.shape[1] ** -0.5, generator=generator)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.5, generator=generator)
            else:
                parameter.uniform_(0.7, 1.3, generator=generator)
    model.to(torch.bfloat16)
    if precision == "fp32":
        model.to(torch.float32)
    model.save_pretrained(folder)
    _tokenizer(shape.vocab_size).save_pretrained(folder)


def _tokenizer(size: int) -> Any:
    """A byte-level BPE tokenizer with `size` ids; what training does not fill are tokens that no text has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    transformers: Any = importlib.import_module("transformers")

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, 49152),
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(_text(), trainer)
    trained.add_tokens([f"<|extra_{number}|>" for number in range(size - trained.get_vocab_size())])
    end = CONTROL_TOKENS[0]
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=trained, eos_token=end, bos_token=end, pad_token=end
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def _text() -> Iterator[str]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"))[:FILES_OF_TEXT]:
        yield path.read_text(encoding="utf-8", errors="ignore")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SHAPES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("precision", choices=("bf16", "fp32"))
    options = parser.parse_args()
    write(SHAPES[options.name], options.folder, options.precision)
