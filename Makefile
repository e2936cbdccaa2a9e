# The tasks of a checkout. The first use of any of them sets up .venv by itself.
#
#   make run       start a system on this machine and chat with it; FERMATA_PORT=0 and the like set it up
#   make test      run the tests         TESTS=tests/unit runs a part, WORKERS=4 gives the unit tests more processes
#   make check     lint, format, types, import directions, contracts and generated code
#   make fix       repair what lint and format can repair
#   make bench     measure what each hop costs, what Ray Serve costs, and what telemetry costs
#   make bench-engine   measure the engine beside others on one model   OPTIONS='--precisions bf16 --rounds 3'
#   make bench-gpu      measure decoding on a GPU, and check it against the CPU   OPTIONS='--shape qwen2.5-0.5b'
#   make soak      ten thousand random sequences through the scheduler, and two hundred schedules per precision
#   make faults    kill every kind of process at every offset of a stream
#   make card      examine the built-in model and write its card   MODEL=folder takes another one
#   make screenshots   pictures of the trace page in build/screenshots   DOCUMENT=file of `fermata trace --json`
#   make viewer    show a trace in a collector from the npm registry, and read it back
#   make protos    generate the Python code of the protos
#   make setup     only set up .venv     PYTHON=python3.12, CONSTRAINTS=other.txt
#
# TORCH_INDEX=URL takes torch from a further index, where the default one has it with CUDA only.

PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
TORCH_INDEX ?=
TESTS ?=
WORKERS ?= 2
MODEL ?=
DOCUMENT ?=
OPTIONS ?=

VENV := .venv
BIN := $(VENV)/bin
SOURCES := services clients/python protos tests infra
STAMP := $(VENV)/.setup
NATIVE := $(wildcard services/shard/kernels/native/source/*)
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
.ONESHELL:

.DEFAULT_GOAL := help
.PHONY: help setup run test check lint format types imports contracts alerts fix bench bench-engine bench-gpu soak faults card screenshots viewer protos

help:
	@sed -n '3,/^$$/s/^# \{0,1\}//p' Makefile

# What was installed is up to date while the files that decide it have the same content, whatever their times.
setup:
	@wanted=$$(cat pyproject.toml clients/python/pyproject.toml $(CONSTRAINTS) | sha256sum)
	if [[ "$$(cat $(STAMP) 2>/dev/null || true)" == "$$wanted $(CURDIR)" ]]; then exit 0; fi
	if [[ ! -x $(BIN)/python ]]; then
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo 'setup: needs Python 3.11; give one with PYTHON=' >&2; exit 1; }
	  echo 'setup: creating $(VENV)' >&2
	  $(PYTHON) -m venv $(VENV)
	fi
	echo 'setup: installing torch and the build tool' >&2
	$(PIP) install -c $(CONSTRAINTS) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch setuptools
	echo 'setup: installing fermata-client and fermata-server with what they need' >&2
	$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e clients/python -e '.[dev]'
	echo 'setup: compiling the kernels of this machine' >&2
	$(BIN)/python -m services.shard.kernels.native.compiler
	echo "$$wanted $(CURDIR)" > $(STAMP)
	echo 'setup: done' >&2

run: setup
	@exec $(BIN)/fermata-server up --chat

test: setup
ifdef TESTS
	@$(BIN)/python -m pytest -q $(TESTS)
else
	@echo 'test: the unit tests, in $(WORKERS) processes' >&2
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile tests/unit
	echo 'test: whole systems, one after another' >&2
	$(BIN)/python -m pytest -q --ignore tests/unit tests
endif

check: lint format types imports contracts alerts

# $(call step,what it looks at,command): one line when it is well, the whole output when it is not.
define step
@begin=$$SECONDS; printf 'check: %-44s' '$(1)'; \
if output=$$($(2) 2>&1); then echo "ok  $$((SECONDS - begin)) s"; else echo 'FAILED'; echo "$$output"; exit 1; fi
endef

lint: setup
	$(call step,lint (ruff),$(BIN)/ruff check .)

format: setup
	$(call step,format (`make fix` repairs),$(BIN)/ruff format --check . && $(BIN)/clang-format --dry-run -Werror $(NATIVE))

types: setup
	$(call step,types (mypy --strict),$(BIN)/mypy $(SOURCES))

imports: setup
	$(call step,import directions (import-linter),$(BIN)/lint-imports)

contracts: setup
	$(call step,protos (buf) and generated code,$(BIN)/python protos/generate.py --check --lint)

# Needs promtool; without it this step is skipped.
alerts: setup
	@if ! promtool=$$(infra/monitoring/promtool.sh $(VENV) 2>/dev/null); then
	  printf 'check: %-44sskipped: no promtool (apt install prometheus)\n' 'alerts (promtool)'; exit 0
	fi
	$(call step,alerts (promtool),$$promtool check config infra/monitoring/prometheus.yaml && $$promtool test rules infra/monitoring/rules_test.yaml)

fix: setup
	@$(BIN)/ruff check --fix -q .
	$(BIN)/ruff format -q .
	$(BIN)/clang-format -i $(NATIVE)

# `make test` does the same at eight seeded offsets per kind.
faults: setup
	@FERMATA_FAULT_OFFSETS=63 $(BIN)/python -m pytest -q --timeout 3600 tests/e2e/test_kills.py tests/e2e/test_serve.py tests/pipeline

soak: setup
	@FERMATA_SOAK_CHOICES=10000 FERMATA_SCHEDULES=200 $(BIN)/python -m pytest -q -s --timeout 3600 \
	  tests/unit/shard/test_soak.py tests/unit/shard/test_schedules.py

bench: setup
	@$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench.serve
	$(BIN)/python -m tests.bench.telemetry

# The other engines come with `python -m tests.bench.peers.prepare`; those that are not there are left out.
bench-engine: setup
	@$(BIN)/python -m tests.bench.engines $(OPTIONS)

# Needs a GPU; OPTIONS='--device cpu --shape smollm2-135m --batches 1 --steps 4 --prefill 64' tries it without.
bench-gpu: setup
	@$(BIN)/python -m tests.bench.gpu $(OPTIONS)

card: setup
	@$(BIN)/python -m infra.models.tiny.card $(if $(MODEL),--model $(MODEL))

# Needs a browser: Chromium or Chrome, or what `playwright install chromium` brings.
screenshots: setup
	@$(PIP) install -c $(CONSTRAINTS) --no-build-isolation -e '.[screenshots]'
	$(BIN)/python -m tests.screenshots build/screenshots $(DOCUMENT)

# Installs 438 MB into .viewer; Linux on x86-64 only.
viewer: setup
	@FERMATA_TEST_VIEWER=$(CURDIR)/.viewer $(BIN)/python -m pytest -q tests/e2e/test_viewer.py

protos: setup
	@$(BIN)/python protos/generate.py
