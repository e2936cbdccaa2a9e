"""Trains the built-in model on the serving model code, by next-token prediction with teacher forcing.

    python -m infra.models.tiny.train --work /tmp/tiny-run            # about 45 minutes on one CPU thread
    python -m infra.models.tiny.train --work /tmp/tiny-quick --quick  # seconds

The loss is the cross-entropy of what the assistant says; what users say is read and not learned. The work folder keeps
a checkpoint, and the same command goes on from it. At the end `--output` holds a Hugging Face folder with the loss
curve.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch.nn import functional

from infra.models.tiny import curve, export, tokenizer
from infra.models.tiny.batches import Batch, BatchSource
from infra.models.tiny.progress import Meter, Progress
from infra.models.tiny.recipe import Recipe, full, quick
from services.shard.kernels.dense import DenseOperations
from services.shard.models.llama import Llama

_CHECKPOINT = "checkpoint.pt"
_CURVE_STEPS = 10
"""Steps whose mean loss is one point of the curve."""


class Trainer:
    """One run of a recipe."""

    def __init__(self, recipe: Recipe, source: BatchSource, work: Path, device: str = "cpu") -> None:
        self.recipe = recipe
        self.progress = Progress()
        self.model = Llama(recipe.model).initialise(torch.Generator().manual_seed(recipe.seed)).to(device)
        self._source, self._work, self._device = source, work, device
        self._operations = DenseOperations()
        self._optimizer = self._new_optimizer()
        self._held_out = source.held_out(recipe.held_out_rows, recipe.held_out_length)

    def run(self) -> None:
        """Trains from where the run is to its end."""
        while self.progress.phase < len(self.recipe.phases):
            self._run_phase()
            if self.recipe.phases[self.progress.phase].only_copies:
                self._optimizer = self._new_optimizer()  # moments of copying say nothing about what follows
            self.progress.phase, self.progress.step = self.progress.phase + 1, 0
            self.save()

    def loss(self, batch: Batch) -> torch.Tensor:
        """Mean cross-entropy of the counted targets, in nats."""
        token_ids, targets = batch.token_ids.to(self._device), batch.targets.to(self._device)
        positions = torch.arange(token_ids.shape[1], device=self._device)
        with torch.autocast(self._device, torch.bfloat16):
            hidden = self.model(token_ids, positions, self._operations)
            counted = targets >= 0  # the head is a third of the work, and most positions are not counted
            logits = self.model.logits(hidden[counted], self._operations)
        return functional.cross_entropy(logits.float(), targets[counted])

    def held_out_perplexity(self) -> float:
        """Perplexity of what the assistant says in conversations that were never trained on."""
        total, count = 0.0, 0
        with torch.no_grad():
            for token_ids, targets in zip(*self._held_out, strict=True):
                counted = int((targets >= 0).sum())
                total += float(self.loss(Batch(token_ids[None], targets[None]))) * counted
                count += counted
        return math.exp(total / count)

    def save(self) -> None:
        """Writes the checkpoint, whole or not at all."""
        self._work.mkdir(parents=True, exist_ok=True)
        partial = self._work / (_CHECKPOINT + ".partial")
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self._optimizer.state_dict(),
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
        self._optimizer.load_state_dict(state["optimizer"])
        self.progress = Progress(**state["progress"])
        return True

    def _run_phase(self) -> None:
        """Does the steps of a phase until its loss is low enough."""
        phase, progress, meter = self.recipe.phases[self.progress.phase], self.progress, Meter(self.progress)
        recent: list[float] = []
        while progress.step < phase.steps and (meter.loss is None or meter.loss > phase.enough):
            started = time.monotonic()
            loss = self._step(self._source.batch(self._batch_number(), phase.rows, phase.length, phase.copy_share))
            progress.step += 1
            progress.tokens += phase.step_tokens
            progress.seconds += time.monotonic() - started
            meter.add(loss)
            recent.append(loss)
            if len(recent) == _CURVE_STEPS:
                progress.losses.append((progress.tokens, sum(recent) / len(recent)))
                recent = []
            if line := meter.line(self.recipe.phases):
                print(line, file=sys.stderr, flush=True)
            if progress.step % self.recipe.measure_every == 0 or progress.step == phase.steps:
                if not phase.only_copies:
                    progress.perplexities.append((progress.tokens, self.held_out_perplexity()))
                self.save()

    def _step(self, batch: Batch) -> float:
        """One step of AdamW; returns the loss before it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.progress.phase, self.progress.step)
        loss = self.loss(batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()

    def _batch_number(self) -> int:
        """Steps done by the phases before, the copy curriculum at its longest, plus those of this one."""
        return sum(phase.steps for phase in self.recipe.phases[: self.progress.phase]) + self.progress.step

    def _new_optimizer(self) -> torch.optim.AdamW:
        matrices = [parameter for parameter in self.model.parameters() if parameter.dim() > 1]
        vectors = [parameter for parameter in self.model.parameters() if parameter.dim() == 1]
        groups = [
            {"params": matrices, "weight_decay": self.recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.recipe.learning_rate, betas=(0.9, 0.95))


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
    }
    export.write_folder(folder, trainer.model, vocabulary)
    (folder / "training.json").write_text(json.dumps(figures, indent=2) + "\n")
    (folder / "loss_curve.svg").write_text(curve.draw(progress.losses, progress.perplexities))
    return figures


def main(arguments: list[str] | None = None) -> None:
    """Runs a recipe from the command line."""
    parser = argparse.ArgumentParser(description="Trains the built-in model.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the checkpoint; goes on from the one there")
    parser.add_argument("--output", type=Path, help="folder of the result; default: `model` in the work folder")
    parser.add_argument("--quick", action="store_true", help="a run of seconds that only shows that it works")
    parser.add_argument("--scale", type=float, default=1.0, help="times the number of steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    recipe = quick() if options.quick else full(options.scale)
    if options.quick:
        vocabulary = tokenizer.train(conversations=500, size=recipe.model.vocabulary_size)
    else:
        vocabulary = tokenizer.load()
    source = BatchSource(tokenizer.ConversationEncoder(vocabulary), recipe.model.vocabulary_size, recipe.seed)
    trainer = Trainer(recipe, source, options.work, options.device)
    trainer.resume()
    trainer.run()
    print(json.dumps(write_result(trainer, vocabulary, options.output or options.work / "model")))


if __name__ == "__main__":
    main()
