"""Which kernels a model gets, and what is said when they are not the fast ones."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from services.shard.kernels import choice
from services.shard.kernels.interface import Kernels
from services.shard.kernels.native import compiler
from services.shard.kernels.native.compiler import CompilerMissing, Target
from services.shard.kernels.native.kernels import NativeKernels
from services.shard.kernels.plain import PlainKernels
from tests.random_model import random_model


def choose(**changes: Any) -> Kernels:
    settings: dict[str, Any] = {
        "block_size": 64, "kv_memory": 1 << 22, "threads": 1, "device": "cpu", "kernels": "auto"
    }  # fmt: skip
    return choice.choose(random_model().requires_grad_(False), "float32", **{**settings, **changes})


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(target: Target) -> Path:
        raise CompilerMissing(f"nothing compiles for {target.name}")

    monkeypatch.setattr(compiler, "build", refuse)


def test_native_ones_where_they_can_be_had(caplog: pytest.LogCaptureFixture) -> None:
    kernels = choose()
    assert isinstance(kernels, NativeKernels) and kernels.name.startswith(compiler.targets()[0].name)
    assert caplog.records == []


def test_plain_ones_on_demand() -> None:
    assert isinstance(choose(kernels="plain"), PlainKernels)


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_plain_torch_and_one_line_that_says_why(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(choose(), PlainKernels)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().endswith(f"nothing compiles for {compiler.targets()[0].name}")


def test_pages_that_native_kernels_do_not_take(caplog: pytest.LogCaptureFixture) -> None:
    assert isinstance(choose(block_size=48), PlainKernels)
    assert "blocks of 48 positions" in caplog.text


@pytest.mark.usefixtures("no_compiler")
def test_who_insists_on_native_ones_is_told_why_not() -> None:
    with pytest.raises(ValueError, match=r"^kernels: no native ones here: .*nothing compiles"):
        choose(kernels="native")


def test_an_instruction_set_that_fails_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    build = compiler.build
    first, *others = compiler.targets()
    if not others:
        pytest.skip("this machine has one instruction set")

    def refuse_first(target: Target) -> Path:
        if target == first:
            raise CompilerMissing("too old")
        return build(target)

    monkeypatch.setattr(compiler, "build", refuse_first)
    assert choose().name.startswith(others[0].name)
