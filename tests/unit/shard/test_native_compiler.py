"""Making the native library: once per machine and version, by whoever comes first, or a reason why not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from services.shard.kernels.native import compiler
from services.shard.kernels.native.binding import Library
from services.shard.kernels.native.compiler import CompilerMissing, Target

PORTABLE = compiler.targets()[-1]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library that compiles at once."""
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "library.cpp").write_text('extern "C" int answer() { return 42; }')
    monkeypatch.setattr(compiler, "SOURCES", folder)
    return folder


def test_the_last_target_needs_nothing() -> None:
    assert PORTABLE.needs == frozenset() and "-DFERMATA_AMX" not in PORTABLE.flags
    names = [target.name for target in compiler.targets()]
    assert len(set(names)) == len(names)


def test_what_is_there_is_not_compiled_again(sources: Path, tmp_path: Path) -> None:
    library = compiler.build(PORTABLE, tmp_path / "cache")
    assert library.name.startswith("portable-")
    made = library.stat().st_mtime_ns
    assert compiler.build(PORTABLE, tmp_path / "cache") == library
    assert library.stat().st_mtime_ns == made


def test_other_sources_and_other_flags_are_other_libraries(sources: Path, tmp_path: Path) -> None:
    first = compiler.build(PORTABLE, tmp_path / "cache")
    flagged = compiler.build(Target("portable", frozenset(), ("-g",)), tmp_path / "cache")
    (sources / "more.h").write_text("// more")
    changed = compiler.build(PORTABLE, tmp_path / "cache")
    assert len({first, flagged, changed}) == 3 and all(path.exists() for path in (first, flagged, changed))


def test_several_at_once_make_one_library(sources: Path, tmp_path: Path) -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(compiler.build(PORTABLE, tmp_path / "cache"))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and len(set(made)) == 1
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.name != "lock"] == [".so"]


def test_no_compiler_is_a_reason(sources: Path, tmp_path: Path) -> None:
    with pytest.raises(CompilerMissing, match="none of no-such-compiler is installed"):
        compiler.build(PORTABLE, tmp_path / "cache", compilers=["no-such-compiler"])


def test_what_a_compiler_refuses_is_named_in_one_line_and_leaves_nothing(sources: Path, tmp_path: Path) -> None:
    (sources / "library.cpp").write_text("this is no C++\n")
    with pytest.raises(CompilerMissing) as refused:
        compiler.build(PORTABLE, tmp_path / "cache")
    assert "error" in str(refused.value) and "\n" not in str(refused.value)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["lock"]


def test_setting_up_without_a_compiler_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(target: Target) -> Path:
        raise CompilerMissing("there is none")

    monkeypatch.setattr(compiler, "build", refuse)
    compiler.main()
    assert capsys.readouterr().err == "no native kernels: there is none\n"


def test_a_file_that_is_no_library_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "portable-0.so"
    path.write_text("no library")
    with pytest.raises(OSError, match="portable-0"):
        Library(path)
