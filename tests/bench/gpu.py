"""`python -m tests.bench.gpu`: how fast the kernels of a GPU decode, beside what its memory can do.

Random weights in the shape of a published model are made on the device and computed by the kernels that a shard has
there: no model's files, no Ray, no network. One line of JSON per measurement, then a table. Before it the same kernels
are held to float32 on the CPU (`tests.bench.device_parity`).

Counted are the bytes that a decode step streams at least: all weights but the input embedding, of which a step reads
some rows, and the keys and values of all sequences.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch

from services.shard import kv_cache
from services.shard.kernels import graphs
from services.shard.kernels.plain import PlainKernels
from services.shard.kernels.transfer import timer_of
from services.shard.models.architecture import Architecture
from services.shard.models.families import llama
from services.shard.models.transformer import Transformer
from services.shard.scheduler import Batch, Chunk
from tests.bench import device_parity
from tests.bench.figures import Kind
from tests.bench.peers.shapes import SHAPES, Shape
from tests.bench.report import Table

LLAMA = "llama-3-8b"
OF_GPU = {**SHAPES, LLAMA: Shape("llama", 128256, 4096, 14336, 32, 32, 8, 8192, 1e-5, 500000.0)}
UNTIED = {LLAMA}
CONTEXT, BLOCK_SIZE, WARM_STEPS = 2048, 64, 8
DTYPE = "bfloat16"
COPIED = {"cuda": 2 << 30, "cpu": 64 << 20}
"""Bytes of the buffer whose copying is called the bandwidth: far more than a cache holds."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Medians of one task.

    Attributes:
        shape, device, graphs: what computed it; whether steps that only decode could be CUDA graphs.
        kind: decode or prefill.
        batch, prompt, steps: what was asked for; of prefill, `steps` counts the prompts, one after the other.
        step_ms: of a step, as the host sees it.
        device_ms: of a step, by the device's clock; None on the CPU.
        rate: tokens per second as the host sees it, of all sequences.
        step_gigabytes: what a step streams at least; None for prefill, which computes more than it reads.
        bandwidth: gigabytes per second that the device copies, both directions counted.
        share: `step_gigabytes` per second of a step divided by `bandwidth`; None for prefill.
    """

    shape: str
    device: str
    graphs: bool
    kind: Kind
    batch: int
    prompt: int
    steps: int
    step_ms: float
    device_ms: float | None
    rate: float
    step_gigabytes: float | None
    bandwidth: float
    share: float | None


def architecture(name: str) -> Architecture:
    """The architecture of a shape, with a context of `CONTEXT`."""
    shape = OF_GPU[name]
    made = llama.architecture(
        vocabulary_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        layer_count=shape.num_hidden_layers,
        head_count=shape.num_attention_heads,
        kv_head_count=shape.num_key_value_heads,
        head_size=shape.head_size,
        context_length=CONTEXT,
        norm_epsilon=shape.rms_norm_eps,
        rope_theta=shape.rope_theta,
        tied_embeddings=name not in UNTIED,
    )
    return replace(made, family=shape.model_type, attention_bias=shape.model_type == "qwen2")


def random_weights(shape: Architecture, device: str) -> Transformer:
    """A model that is made where it computes, in bfloat16 from the first: no wider copy is anywhere."""
    with torch.device(device):
        model = Transformer(shape, torch.bfloat16)
    return model.initialise(torch.Generator(device).manual_seed(1))


def weight_bytes(model: Transformer) -> int:
    """Bytes of all parameters but the input embedding; a head that is tied to it counts."""
    total = sum(parameter.nbytes for name, parameter in model.named_parameters() if name != "embedding")
    return total + (model.embedding.nbytes if model.head is None else 0)


def copy_bandwidth(device: str, rounds: int = 20) -> float:
    """Gigabytes per second that a copy within the device's memory reads and writes together."""
    source = torch.ones(COPIED[torch.device(device).type], dtype=torch.uint8, device=device)
    target, timer = torch.empty_like(source), timer_of(device)
    taken = []
    for _ in range(rounds):
        began = time.perf_counter_ns()
        timer.start()
        target.copy_(source)
        device_ns = timer.stop()
        taken.append(time.perf_counter_ns() - began if device_ns is None else device_ns)
    return 2 * source.nbytes / statistics.median(taken)


class Bench:
    """A model with random weights on a device, and what is measured of it."""

    def __init__(self, name: str, device: str, *, with_graphs: bool, blocks: int) -> None:
        self._name, self._device = name, device
        self.bandwidth = copy_bandwidth(device)
        model = random_weights(architecture(name), device)
        self._shape = model.architecture
        record = graphs.recorder(device) if with_graphs else None
        self._graphs = record is not None
        self._kernels = PlainKernels(
            model, DTYPE, block_count=blocks, block_size=BLOCK_SIZE, device=device, record=record
        )
        self._weight_bytes = weight_bytes(model)  # as the kernels keep them: float32 on the CPU

    def decode(self, batch: int, prompt: int, steps: int) -> Measurement:
        """Greedy decoding behind random prompts."""
        dice, size = random.Random(batch), blocks_for(prompt + WARM_STEPS + steps)
        tables = [list(range(size * index, size * index + size)) for index in range(batch)]
        tokens = [self._step([Chunk(0, self._prompt(dice, prompt), table, draws=True)])[0][0] for table in tables]
        host, device = [], []
        for position in range(prompt, prompt + WARM_STEPS + steps):
            chunks = [Chunk(position, [token], table, draws=True) for token, table in zip(tokens, tables, strict=True)]
            tokens, host_ns, device_ns = self._step(chunks)
            host.append(host_ns)
            device.append(device_ns)
        position_bytes = kv_cache.block_bytes(self._shape, 1, self._kernels.cache.dtype)
        context = prompt + WARM_STEPS + steps / 2
        streamed = (self._weight_bytes + batch * context * position_bytes) / 1e9
        return self._measurement(
            Kind.DECODE, batch, prompt, host=host[WARM_STEPS:], device=device[WARM_STEPS:], streamed=streamed
        )

    def prefill(self, prompt: int, rounds: int = 5) -> Measurement:
        """One prompt in a single step; the first one is not counted."""
        dice, table = random.Random(0), list(range(blocks_for(prompt)))
        taken = [self._step([Chunk(0, self._prompt(dice, prompt), table, draws=True)])[1:] for _ in range(1 + rounds)]
        host, device = zip(*taken[1:], strict=True)
        return self._measurement(Kind.PREFILL, 1, prompt, host=host, device=device, streamed=None)

    def _step(self, chunks: list[Chunk]) -> tuple[list[int], int, int | None]:
        """One step: the tokens, and nanoseconds of the host and of the device."""
        began = time.perf_counter_ns()
        logits = self._kernels.forward(Batch(chunks, []), [False] * len(chunks))
        taken = time.perf_counter_ns() - began
        if logits.best is None or min(logits.best) < 0:
            raise RuntimeError("a logit is no number")
        return logits.best, taken, logits.device_ns

    def _prompt(self, dice: random.Random, length: int) -> list[int]:
        return dice.choices(range(self._shape.vocabulary_size), k=length)

    def _measurement(
        self,
        kind: Kind,
        batch: int,
        prompt: int,
        *,
        host: Sequence[int],
        device: Sequence[int | None],
        streamed: float | None,
    ) -> Measurement:
        seconds = statistics.median(host) / 1e9
        by_device = [each for each in device if each is not None]
        return Measurement(
            shape=self._name,
            device=describe(self._device),
            graphs=self._graphs,
            kind=kind,
            batch=batch,
            prompt=prompt,
            steps=len(host),
            step_ms=1e3 * seconds,
            device_ms=statistics.median(by_device) / 1e6 if by_device else None,
            rate=batch * (prompt if kind is Kind.PREFILL else 1) / seconds,
            step_gigabytes=streamed,
            bandwidth=self.bandwidth,
            share=None if streamed is None else streamed / seconds / self.bandwidth,
        )


def blocks_for(positions: int) -> int:
    """Blocks of a sequence that has so many positions."""
    return -(-positions // BLOCK_SIZE)


def describe(device: str) -> str:
    """The name of a device."""
    if torch.device(device).type == "cpu":
        return platform.processor() or platform.machine()
    return torch.cuda.get_device_name(device)


def table(rows: Sequence[Measurement]) -> Table:
    """The measurements for people."""
    head = ["", "step, ms", "on the device, ms", "tokens/s", "streamed, GB", "share of the copy bandwidth"]
    lines = []
    for row in rows:
        title = f"prefill {row.prompt}" if row.kind is Kind.PREFILL else f"decode, batch {row.batch}"
        on_device = "" if row.device_ms is None else f"{row.device_ms:.2f}"
        streamed = "" if row.step_gigabytes is None else f"{row.step_gigabytes:.2f}"
        share = "" if row.share is None else f"{100 * row.share:.0f} %"
        lines.append([title, f"{row.step_ms:.2f}", on_device, f"{row.rate:.0f}", streamed, share])
    first = rows[0]
    title = f"{first.shape}, {DTYPE}, {first.device}, copies at {first.bandwidth:.0f} GB/s"
    return Table(title + (", CUDA graphs" if first.graphs else ""), [head, *lines])


def measure(options: argparse.Namespace) -> Iterator[Measurement]:
    """All tasks of the options."""
    sequence = blocks_for(options.prompt + WARM_STEPS + options.steps)
    blocks = max([blocks_for(options.prefill), *(batch * sequence for batch in options.batches)])
    bench = Bench(options.shape, options.device, with_graphs=not options.eager, blocks=blocks)
    for batch in options.batches:
        yield bench.decode(batch, options.prompt, options.steps)
    yield bench.prefill(options.prefill)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=OF_GPU, default=LLAMA)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N, or cpu to try the benchmark itself")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each sequence before it decodes")
    parser.add_argument("--steps", type=int, default=64, help="decode steps of which the median is taken")
    parser.add_argument("--prefill", type=int, default=1024, help="tokens of the prompt whose prefill is measured")
    parser.add_argument("--eager", action="store_true", help="without CUDA graphs")
    options = parser.parse_args(arguments)
    if max(options.prompt + WARM_STEPS + options.steps, options.prefill) > CONTEXT:
        parser.error(f"the context has {CONTEXT} positions")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Checks and measures; returns the exit status, 1 without a GPU or where the numbers are wrong."""
    options = parse(arguments)
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        print("no GPU here: torch finds no CUDA device (--device cpu tries the benchmark itself)", file=sys.stderr)
        return 1
    checks = device_parity.check(options.device, with_graphs=not options.eager)
    for check in checks:
        print(check.line())
    rows = []
    for row in measure(options):
        print(json.dumps(asdict(row)), flush=True)
        rows.append(row)
    print(table(rows).plain())
    return 0 if all(check.holds for check in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
