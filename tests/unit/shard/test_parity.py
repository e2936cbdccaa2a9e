"""Every family as it is served against transformers: the same model in float64 is the reference of both."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from services.shard import weights
from services.shard.models.registry import read_architecture
from services.shard.runner import Runner
from services.shard.scheduler import Batch, Chunk
from tests.families import family_models, open_family, write_family

BLOCK_SIZE = 32
LENGTH = 200
"""Longer than every window, several pages more, and three times the context before llama3's scaling."""
NAMES = [name for name, _ in family_models()]
CLOSE = 1e-3
"""Two logits that are closer may change places."""


class Case(NamedTuple):
    """A model with what transformers computes of some sequences [2, LENGTH]."""

    folder: Path
    token_ids: Tensor
    exact: Tensor
    theirs: Tensor
    kernels: str = "auto"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


@pytest.fixture(scope="module")
def case_of(folders: Path) -> Any:
    @functools.cache
    def make(name: str) -> Case:
        folder = write_family(folders / name, name)
        token_ids = torch.randint(0, 320, (2, LENGTH), generator=torch.Generator().manual_seed(5))
        with torch.no_grad():
            exact, theirs = (open_family(folder, kind)(token_ids).logits for kind in (torch.float64, torch.float32))
        return Case(folder, token_ids, exact, theirs)

    return make


@pytest.fixture(params=NAMES)
def case(request: pytest.FixtureRequest, case_of: Any, kernels: str) -> Case:
    torch.set_num_threads(1)
    made: Case = case_of(request.param)
    return made._replace(kernels=kernels)


@pytest.fixture(params=["native", "plain"])
def kernels(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def open_runner(case: Case, dtype: str = "auto", folder: Path | None = None) -> Runner:
    return Runner(
        folder or case.folder,
        block_size=BLOCK_SIZE,
        kv_memory=16 << 20,
        threads=1,
        dtype=dtype,
        kernels=case.kernels,
    )


def table(first: int) -> list[int]:
    """Blocks of a whole sequence."""
    return list(range(first, first + -(-LENGTH // BLOCK_SIZE)))


def compute(runner: Runner, token_ids: list[int], sizes: list[int], blocks: list[int], start: int = 0) -> Iterator[Any]:
    """Position and logits behind each chunk of a sequence."""
    for size in sizes:
        chunk = Chunk(start, token_ids[start : start + size], blocks[: -(-(start + size) // BLOCK_SIZE)], draws=True)
        start += size
        yield start - 1, runner.forward(Batch([chunk], [])).values[0]


def token_by_token(runner: Runner, token_ids: Tensor) -> Tensor:
    """Logits behind each token of sequences [2, LENGTH], decoded together."""
    rows = []
    for position in range(LENGTH):
        chunks = [
            Chunk(position, [ids[position]], table(20 * index)[: position // BLOCK_SIZE + 1], draws=True)
            for index, ids in enumerate(token_ids.tolist())
        ]
        rows.append(runner.forward(Batch(chunks, [])).values)
    return torch.stack(rows, 1)


def largest_error(logits: Tensor, exact: Tensor) -> float:
    return float((logits.double() - exact).abs().max())


def assert_same_choices(logits: Tensor, exact: Tensor) -> None:
    """The greedy token is the same wherever two are not so close that rounding may choose."""
    first, second = exact.topk(2).values.unbind(-1)
    clear = first - second >= CLOSE
    assert clear.float().mean() > 0.9
    assert torch.equal(logits.argmax(-1)[clear], exact.argmax(-1)[clear])


def test_the_reference_says_much(case: Case) -> None:
    """A model that repeats itself, or its input, would hide mistakes."""
    chosen = case.exact.argmax(-1)
    assert 2.0 < case.exact.std() < 4.0
    assert len(set(chosen.flatten().tolist())) >= 100
    assert (chosen == case.token_ids).float().mean() < 0.5


def test_logits_are_as_exact_as_those_of_transformers(case: Case) -> None:
    """Decoded token by token, in chunks, behind a prefix that somebody else computed: R23 makes these equal bits."""
    runner = open_runner(case)
    assert runner.fingerprint.kernels.split(":")[1:3] == ["cpu", "float32"]
    decoded = token_by_token(runner, case.token_ids)
    assert largest_error(decoded, case.exact) <= 2 * largest_error(case.theirs, case.exact)
    assert_same_choices(decoded, case.exact)
    token_ids, expected = case.token_ids[0].tolist(), decoded[0]
    draw = random.Random(3)
    odd = [draw.choice([1, 2, 3, 15, 16, 17, 33]) for _ in range(8)]
    for sizes in ([LENGTH], [LENGTH - 1, 1], [17] * 11 + [13], odd):
        for position, logits in compute(runner, token_ids, sizes, table(40)):
            assert torch.equal(logits, expected[position])
    for hit in (32, 96, 192):  # the first blocks are those of the sequence that was decoded
        blocks = [*table(0)[: hit // BLOCK_SIZE], *table(50)]
        for position, logits in compute(runner, token_ids, [LENGTH - hit], blocks, start=hit):
            assert torch.equal(logits, expected[position])


def test_greedy_generation_is_that_of_transformers(case: Case) -> None:
    model, runner, count, certain = open_family(case.folder, torch.float64), open_runner(case), 30, 0
    for length in (50, 70, 90):
        token_ids = case.token_ids[1:, :length]
        with torch.no_grad():
            generated = model.generate(
                token_ids, attention_mask=torch.ones_like(token_ids), max_new_tokens=count, do_sample=False,
                eos_token_id=None, pad_token_id=0,
            )  # fmt: skip
            exact = model(generated).logits[0, length - 1 : -1]
        expected, ids, size = generated[0].tolist(), token_ids[0].tolist(), length
        for top in exact.topk(2).values:
            if top[0] - top[1] < CLOSE:
                break
            ((_, logits),) = compute(runner, ids, [size], table(0), start=len(ids) - size)
            ids.append(int(logits.argmax()))
            size, certain = 1, certain + 1
        assert ids == expected[: len(ids)]
    assert certain >= count


def test_later_tokens_change_nothing_before_them(case: Case) -> None:
    """Causality bit for bit: with another end, computed in the same chunk, what stands before has equal logits."""
    runner, token_ids = open_runner(case), case.token_ids[0].tolist()
    for place in (199, 130, 65, 17):
        rows: list[Tensor] = []
        for end in (token_ids[place:], case.token_ids[1, place:].tolist()):
            ids = token_ids[:place] + end
            list(compute(runner, ids, [LENGTH], table(0)))
            rows.extend(logits for _, logits in compute(runner, ids, [1], table(0), start=place - 1))
        assert torch.equal(rows[0], rows[1])


def test_bfloat16_is_as_exact_as_that_of_transformers(case: Case, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", case.folder.name, dtype=torch.bfloat16)
    with torch.no_grad():
        exact, theirs = (open_family(folder, kind)(case.token_ids).logits for kind in (torch.float64, torch.bfloat16))
    runner = open_runner(case, folder=folder)
    assert runner.fingerprint.kernels.split(":")[1:3] == ["cpu", "bfloat16"]
    assert torch.equal(weights.load_model(folder).embedding, weights.load_model(folder, "float32").embedding.bfloat16())
    decoded = token_by_token(runner, case.token_ids)
    assert decoded.dtype == torch.float32
    assert largest_error(decoded, exact) <= largest_error(theirs, exact)
    token_ids = case.token_ids[0].tolist()
    for position, logits in compute(runner, token_ids, [17, 64, 1, 118], table(40)):
        assert torch.equal(logits, decoded[0, position])
    widened = token_by_token(open_runner(case, "float32", folder), case.token_ids)
    assert largest_error(widened, exact) < 1e-2 * largest_error(decoded, exact)


def test_eight_bits_are_near(case: Case) -> None:
    runner = open_runner(case, "int8")
    assert runner.fingerprint.kernels.split(":")[1:3] == ["cpu", "int8"]
    error = token_by_token(runner, case.token_ids).double() - case.exact
    assert 0.001 < error.square().mean().sqrt() / case.exact.std() < 0.1


def test_shards_and_a_single_file_are_the_same_model(case: Case, tmp_path: Path) -> None:
    folder = write_family(tmp_path / "model", case.folder.name, shard_size="100KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    expected = weights.load_model(case.folder).state_dict()
    for name, tensor in weights.load_model(folder).state_dict().items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama-biased", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
        ("llama-linear", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 39}),
        ("qwen2-windows", {"max_window_layers": 2, "layer_types": None}),
        ("gemma2", {"attn_logit_softcapping": None}),
        ("gemma2", {"final_logit_softcapping": None}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma2", {"layer_types": ["sliding_attention"] * 4}),
        ("gemma3", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 50000.0}}}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 50000.0}}}),
    ],
)
def test_each_field_is_seen_in_the_logits(name: str, changes: dict[str, Any], case_of: Any, tmp_path: Path) -> None:
    """Otherwise the parity above would not show it."""
    case: Case = case_of(name)
    folder = tmp_path / "changed"
    shutil.copytree(case.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    for field, value in changes.items():
        whole = isinstance(value, dict) and "rope_type" not in value
        config[field] = {**config[field], **value} if whole else value
    (folder / "config.json").write_text(json.dumps(config))
    assert read_architecture(config) != weights.load_architecture(case.folder)
    ((_, logits),) = compute(open_runner(case, folder=folder), case.token_ids[0].tolist(), [LENGTH], table(0))
    assert largest_error(logits, case.exact[0, -1]) > 10 * largest_error(case.theirs, case.exact)
