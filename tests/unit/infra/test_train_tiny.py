"""Batches, the trainer and the folder of the built-in model."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from infra.models.tiny import batches, curve, progress, recipe, tokenizer, train
from infra.models.tiny.corpus import conversations
from services.common.vocabulary import Vocabulary
from services.shard.kernels.dense import DenseOperations
from services.shard.runner import Runner
from services.shard.scheduler import Batch, Chunk
from services.shard.weights import load_architecture, load_model

BUILT_IN = tokenizer.FOLDER


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The work folder of a quick run from the command line."""
    work = tmp_path_factory.mktemp("quick")
    train.main(["--work", str(work), "--quick"])
    return work


# --- batches


def test_only_the_assistant_is_learned() -> None:
    vocabulary = tokenizer.load()
    encoder = tokenizer.ConversationEncoder(vocabulary)
    for conversation in islice(conversations.training(5), 200):
        token_ids, written = encoder.encode(conversation)
        learned = vocabulary.decode(
            [token_id for token_id, counted in zip(token_ids, written, strict=True) if counted],
            skip_special_tokens=False,
        )
        if conversation.messages[0].role == "text":
            assert learned == conversation.messages[0].content + tokenizer.END_OF_TEXT
        else:
            answers = [message.content for message in conversation.messages if message.role == "assistant"]
            assert learned == "".join(answer + tokenizer.TURN_END for answer in answers)


def test_targets_are_the_following_ids() -> None:
    phase = recipe.Phase("some", 1, step_tokens=2048, longest=256, practice=0.3)
    batch = next(_source().batches(phase, 0))
    assert batch.token_ids.shape == batch.targets.shape
    assert 1024 < batch.token_ids.numel() <= 2048
    following, targets = batch.token_ids[:, 1:], batch.targets[:, :-1]
    counted = targets != batches.NOT_COUNTED
    assert 0.1 < counted.float().mean() < 0.9
    assert torch.equal(targets[counted], following[counted])


def test_a_run_that_goes_on_reads_the_same_batches() -> None:
    phase = recipe.Phase("some", 1, step_tokens=512, longest=128)
    straight = list(islice(_source().batches(phase, 0), 230))
    for first in (0, 3, 199, 200, 225):
        assert torch.equal(next(_source().batches(phase, first)).token_ids, straight[first].token_ids)
    assert not torch.equal(straight[0].token_ids, straight[200].token_ids)
    assert not torch.equal(next(_source(seed=2).batches(phase, 0)).token_ids, straight[0].token_ids)


def test_a_row_is_one_conversation_and_padding() -> None:
    phase = recipe.Phase("some", 1, step_tokens=4096, longest=1408)
    source, ends = _source(), 0
    for batch in islice(source.batches(phase, 0), 20):
        assert batch.token_ids.shape[1] in batches.LENGTHS
        for token_ids, targets in zip(batch.token_ids, batch.targets, strict=True):
            padded = (token_ids == 0).nonzero()[:, 0]
            if len(padded):
                ends += 1
                assert torch.all(token_ids[padded[0] :] == 0)
                assert torch.all(targets[padded[0] :] == batches.NOT_COUNTED)
    assert ends > 50


def test_conversations_are_rendered_as_the_template_does() -> None:
    reference = AutoTokenizer.from_pretrained(BUILT_IN)
    encoder = tokenizer.ConversationEncoder(tokenizer.load())
    for conversation in islice(conversations.training(6), 200):
        if conversation.messages[0].role == "text":
            continue
        messages = [{"role": message.role, "content": message.content} for message in conversation.messages]
        rendered = str(reference.apply_chat_template(messages, tokenize=False))
        assert tokenizer.render(conversation) == rendered + tokenizer.END_OF_TEXT
        assert encoder.encode(conversation)[0][:-1] == reference(rendered)["input_ids"]


# --- training


def test_the_learning_rate_rises_and_falls_once() -> None:
    plan = recipe.full(0.3)
    rates = [plan.rate(index, step) for index, phase in enumerate(plan.phases) for step in range(phase.steps)]
    peak = rates.index(max(rates))
    assert 0 < peak < 100
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[peak] > 0.9 * plan.learning_rate
    assert rates[-1] < plan.learning_rate / 50


def test_quick_training_lowers_the_loss(quick_run: Path) -> None:
    figures = json.loads((quick_run / "model" / "training.json").read_text())
    assert figures["last_loss"] < figures["first_loss"] - 0.5
    first, _, perplexity = figures["perplexity_by_position"][0]
    assert first == 0
    assert perplexity > 1
    untrained = train.Trainer(recipe.quick(), _quick_source(quick_run), quick_run).held_out_perplexity()
    assert figures["held_out_perplexity"] < untrained / 2


def test_a_run_that_was_killed_goes_on_to_the_same_weights(quick_run: Path, tmp_path: Path) -> None:
    class Killed(train.Trainer):
        def save(self) -> None:
            super().save()
            if (self.progress.phase, self.progress.step) == (1, 35):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Killed(recipe.quick(), _quick_source(quick_run), tmp_path).run()
    second = train.Trainer(recipe.quick(), _quick_source(quick_run), tmp_path)
    assert second.resume()
    assert (second.progress.phase, second.progress.step) == (1, 35)
    second.run()
    straight = train.Trainer(recipe.quick(), _quick_source(quick_run), quick_run)
    assert straight.resume()
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, dict(second.model.named_parameters())[name])


def test_the_line_tells_the_speed_and_the_time_left() -> None:
    now = 100.0
    phases = (
        recipe.Phase("practice", 5, step_tokens=10, longest=10),
        recipe.Phase("talk", 8, step_tokens=200, longest=100),
    )
    state = progress.Progress(phase=1, step=1, tokens=250)
    meter = progress.Meter(state, clock=lambda: now)
    meter.add(2.0)
    assert meter.line(phases) is None  # nothing was measured yet
    now, state.step, state.tokens = 110.0, 3, 650
    meter.add(1.0)
    line = meter.line(phases)
    assert line is not None
    assert line.split("  ") == ["talk 3/8", "loss 1.900", "0.00 M tokens", "40 tokens/s", "0.4 min left"]
    assert meter.line(phases) is None


def test_the_curve_is_a_picture(quick_run: Path) -> None:
    drawn = (quick_run / "model" / "loss_curve.svg").read_text()
    assert ElementTree.fromstring(drawn).tag.endswith("svg")
    root = ElementTree.fromstring(curve.draw([(10, 4.0), (20, 2.0), (30, 1.0)], [(30, 2.5)]))
    line = root.findall("{*}polyline")[0].attrib["points"].split()
    heights = [float(point.split(",")[1]) for point in line]
    assert len(heights) == 3
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.2)  # the axis is logarithmic


# --- the exported folder


@pytest.mark.parametrize("which", ["quick", "built-in"])
def test_transformers_and_the_serving_code_agree(which: str, quick_run: Path) -> None:
    folder = quick_run / "model" if which == "quick" else BUILT_IN
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = load_model(folder, "float32")
    token_ids = torch.randint(model.architecture.vocabulary_size, (150,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(token_ids[None]).logits[0]
        operations = DenseOperations()
        dense = model.logits(model(token_ids, torch.arange(len(token_ids)), operations), operations)
    torch.testing.assert_close(dense, expected, rtol=1e-4, atol=1e-4)
    runner = Runner(folder, block_size=64, kv_memory=1 << 22, threads=1, dtype="float32")
    served = runner.forward(Batch([Chunk(0, token_ids.tolist(), [0, 1, 2], draws=True)], [])).values
    torch.testing.assert_close(served[0], expected[-1], rtol=1e-4, atol=1e-4)


def test_the_built_in_folder_is_small_and_whole() -> None:
    config = load_architecture(BUILT_IN)
    assert config.context_length >= 1024
    assert (BUILT_IN / "model.safetensors").stat().st_size <= 12e6
    assert sum(parameter.numel() for parameter in load_model(BUILT_IN).parameters()) <= 5_000_000
    reference = AutoTokenizer.from_pretrained(BUILT_IN)
    assert len(reference) == config.vocabulary_size
    assert (reference.eos_token, reference.bos_token) == (tokenizer.TURN_END, tokenizer.END_OF_TEXT)
    generation = json.loads((BUILT_IN / "generation_config.json").read_text())
    assert reference.eos_token_id in generation["eos_token_id"]
    assert json.loads((BUILT_IN / "config.json").read_text())["eos_token_id"] == reference.eos_token_id


def test_digits_are_single_tokens_and_all_bytes_come_back() -> None:
    vocabulary = tokenizer.load()
    assert vocabulary.encode("2024").tokens == ["2", "0", "2", "4"]
    text = "".join(map(chr, range(1, 0x250))) + "the café, 12 🙂 日本語\n\t end"
    token_ids = vocabulary.encode(text).ids
    assert vocabulary.decode(token_ids, skip_special_tokens=False) == text
    assert Vocabulary.from_tokenizer(vocabulary).decode(token_ids) == text


def _source(seed: int = 1) -> batches.BatchSource:
    return batches.BatchSource(tokenizer.ConversationEncoder(tokenizer.load()), seed)


def _quick_source(quick_run: Path) -> batches.BatchSource:
    plan = recipe.quick()
    encoder = tokenizer.ConversationEncoder(tokenizer.load(quick_run / "model"))
    return batches.BatchSource(encoder, plan.seed)
