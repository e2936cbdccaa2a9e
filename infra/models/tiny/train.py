"""Trains the built-in model on the serving model code, by next-token prediction with teacher forcing.

    python -m infra.models.tiny.train --work /tmp/tiny-run            # about an hour on two CPU threads
    python -m infra.models.tiny.train --work /tmp/tiny-quick --quick  # seconds

The loss is the cross-entropy of what the assistant says; what users say is read and not learned. The work folder keeps
a checkpoint, and the same command goes on from it. At the end `--output` holds a Hugging Face folder with the loss
curve.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from infra.models.tiny import curve, export, tokenizer
from infra.models.tiny.batches import LENGTHS, Batch, BatchSource
from infra.models.tiny.progress import Meter, Progress
from infra.models.tiny.recipe import Recipe, full, quick
from services.shard.kernels.dense import DenseOperations
from services.shard.models.transformer import Transformer

_CHECKPOINT = "checkpoint.pt"
_CURVE_STEPS = 10
"""Steps whose mean loss is one point of the curve."""


class Trainer:
    """One run of a recipe."""

    def __init__(
        self, recipe: Recipe, source: BatchSource, work: Path, device: str = "cpu", compiled: bool = False
    ) -> None:
        self.recipe = recipe
        self.progress = Progress()
        self.model = Transformer(recipe.model).initialise(torch.Generator().manual_seed(recipe.seed)).to(device)
        self._source, self._work, self._device = source, work, device
        self._operations = DenseOperations()
        self._optimizers = self._new_optimizers()
        self._held_out = source.held_out(recipe.held_out_rows, recipe.held_out_length)
        self._trained: Callable[..., torch.Tensor] = self.model
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # one for each length of rows
            self._trained = torch.compile(self.model, dynamic=False)

    def run(self) -> None:
        """Trains from where the run is to its end."""
        while self.progress.phase < len(self.recipe.phases):
            self._run_phase()
            self.progress.phase, self.progress.step = self.progress.phase + 1, 0
            self.save()

    def losses(self, batch: Batch, reduction: str = "mean", label_smoothing: float = 0.0) -> torch.Tensor:
        """Cross-entropy of the counted targets in nats, as `functional.cross_entropy` reduces it."""
        token_ids, targets = batch.token_ids.to(self._device), batch.targets.to(self._device)
        positions = torch.arange(token_ids.shape[1], device=self._device)
        with torch.autocast(self._device, torch.bfloat16):
            forward = self._trained if torch.is_grad_enabled() else self.model
            hidden = forward(token_ids, positions, self._operations)
            counted = targets >= 0  # the head is a third of the work, and most positions are not counted
            logits = self.model.logits(hidden[counted], self._operations)
        return functional.cross_entropy(
            logits.float(), targets[counted], reduction=reduction, label_smoothing=label_smoothing
        )

    def held_out_perplexity(self) -> float:
        """Perplexity of what the assistant says in conversations that were never trained on."""
        return math.exp(float(torch.cat([losses for _, losses in self._held_out_losses()]).mean()))

    def perplexity_by_position(self) -> list[tuple[int, int, float]]:
        """(first, last, perplexity) of the held-out tokens whose positions lie in a range."""
        parts = list(self._held_out_losses())
        positions, losses = (torch.cat([part[index] for part in parts]) for index in (0, 1))
        found = []
        for first, following in pairwise((0, *LENGTHS)):
            here = (positions >= first) & (positions < following)
            if here.any():
                found.append((first, following - 1, round(math.exp(float(losses[here].mean())), 4)))
        return found

    def _held_out_losses(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Position and loss of each counted token, conversation by conversation."""
        for batch in self._held_out:
            with torch.no_grad():
                positions = (batch.targets >= 0).nonzero()[:, 1] + 1
                yield positions, self.losses(batch, reduction="none")

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        self._work.mkdir(parents=True, exist_ok=True)
        partial = self._work / (_CHECKPOINT + ".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self._optimizers],
                "progress": {name: getattr(self.progress, name) for name in Progress.__slots__},
            },
            partial,
        )
        partial.replace(self._work / _CHECKPOINT)

    def resume(self) -> bool:
        """Goes on from the checkpoint of the work folder; False if there is none."""
        path = self._work / _CHECKPOINT
        if not path.exists():
            return False
        state: dict[str, Any] = torch.load(path, map_location=self._device, weights_only=True)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self._optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.progress = Progress(**state["progress"])
        return True

    def _run_phase(self) -> None:
        """Does the steps of a phase."""
        phase, progress, meter = self.recipe.phases[self.progress.phase], self.progress, Meter(self.progress)
        recent: list[float] = []
        batches = self._source.batches(phase, progress.step)
        while progress.step < phase.steps:
            started = time.monotonic()
            batch = next(batches)
            loss = self._step(batch)
            progress.step += 1
            progress.tokens += batch.token_ids.numel()
            progress.seconds += time.monotonic() - started
            meter.add(loss)
            recent.append(loss)
            if len(recent) == _CURVE_STEPS:
                progress.losses.append((progress.tokens, sum(recent) / len(recent)))
                recent = []
            if line := meter.line(self.recipe.phases):
                print(line, file=sys.stderr, flush=True)
            if progress.step % self.recipe.measure_every == 0 or progress.step == phase.steps:
                progress.perplexities.append((progress.tokens, self.held_out_perplexity()))
                self.save()

    def _step(self, batch: Batch) -> float:
        """One step of the optimizers; returns the loss before it."""
        rate = self.recipe.rate(self.progress.phase, self.progress.step)
        loss = self.losses(batch, label_smoothing=self.recipe.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    def _new_optimizers(self) -> tuple[torch.optim.Optimizer, ...]:
        matrices = [parameter for parameter in self.model.layers.parameters() if parameter.dim() > 1]
        chosen = set(map(id, matrices))
        others = [parameter for parameter in self.model.parameters() if id(parameter) not in chosen]
        decay = self.recipe.weight_decay
        return (
            torch.optim.Muon(matrices, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
        )


def write_result(trainer: Trainer, vocabulary: Tokenizer, folder: Path) -> dict[str, object]:
    """Writes the model's folder, the curve and the figures; returns the figures."""
    export.round_weights(trainer.model)
    progress = trainer.progress
    figures: dict[str, object] = {
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "training_tokens": progress.tokens,
        "training_seconds": round(progress.seconds),
        "tokens_per_second": round(progress.tokens / progress.seconds),
        "first_loss": round(progress.losses[0][1], 4),
        "last_loss": round(progress.losses[-1][1], 4),
        "held_out_perplexity": round(trainer.held_out_perplexity(), 4),
        "perplexity_by_position": trainer.perplexity_by_position(),
        "seed": trainer.recipe.seed,
        "hardware": _hardware(),
    }
    export.write_folder(folder, trainer.model, vocabulary)
    (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "loss_curve.svg").write_text(curve.draw(progress.losses, progress.perplexities))
    return figures


def _hardware() -> str:
    """What the run computes on, in words."""
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    threads = torch.get_num_threads()
    return f"{threads} {'thread' if threads == 1 else 'threads'} of {names[0] if names else platform.machine()}"


def main(arguments: list[str] | None = None) -> None:
    """Runs a recipe from the command line."""
    parser = argparse.ArgumentParser(description="Trains the built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint; goes on from the one there")
    parser.add_argument("--output", type=Path, help="folder of the result; default: `model` in the work folder")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows that it works")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of steps")
    parser.add_argument("--seed", type=int, default=1, help="of the weights and of what is read")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = replace(quick() if options.quick else full(options.scale), seed=options.seed)
    vocabulary = tokenizer.train(count=500, size=recipe.model.vocabulary_size) if options.quick else tokenizer.load()
    source = BatchSource(tokenizer.ConversationEncoder(vocabulary), recipe.seed)
    trainer = Trainer(recipe, source, options.work, options.device, compiled=not options.quick)
    trainer.resume()
    trainer.run()
    print(json.dumps(write_result(trainer, vocabulary, options.output or options.work / "model")))


if __name__ == "__main__":
    main()
