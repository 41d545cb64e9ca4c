# The targets that people and CI call. `make help` lists them.

PYTHON ?= python3
# the newest torch that has a CPU-only build where this runs; on a GPU host set TORCH= to keep the installed one
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ARGS ?=
ENGINE ?= lmcache
ENGINE_VENV ?= .venv-$(ENGINE)

.PHONY: help setup check format test test-engines test-faults fuzz demo bench bench-store bench-lmcache bench-gpu bench-quality proto clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(STAMP)  ## make .venv with everything the other targets need

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tq-store needs Python 3.11 or newer; name one with make PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(if $(TORCH),$(BIN)/python -m pip install --quiet "$(TORCH)")
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

check: $(STAMP)  ## formatting, lint, types, import contracts, generated code
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	proto/generate.sh --check

format: $(STAMP)  ## rewrite files the way check wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

test: $(STAMP)  ## all tests with coverage, on real Redis, sockets, processes and the real model; ARGS picks some
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || tests/install_redis.sh
	@command -v faketime >/dev/null || tests/install_faketime.sh
	@tests/install_tools.sh
	$(BIN)/python -m tq_connectors.hf.models
	$(BIN)/python -m pytest $(or $(ARGS),-n auto --maxprocesses 4 --dist loadfile --cov --cov-report=term-missing:skip-covered)

test-engines:  ## the tests of one engine in an environment of its own; ENGINE=lmcache, ENGINE_VENV=elsewhere
	PYTHON=$(PYTHON) TORCH="$(TORCH)" tests/engines/$(ENGINE)/install.sh $(ENGINE_VENV)
	tests/engines/$(ENGINE)/run.sh $(ENGINE_VENV) $(if $(ARGS),-m pytest $(ARGS))

test-faults: $(STAMP)  ## inject faults and count what breaks, four minutes; ARGS="--minutes 30 --seed 7" for longer
	@command -v redis-server >/dev/null || command -v valkey-server >/dev/null || tests/install_redis.sh
	@command -v faketime >/dev/null || tests/install_faketime.sh
	@PYTHONPATH=tests $(BIN)/python -m faults $(ARGS)

fuzz: $(STAMP)  ## throw what nobody should send at every parser and at a server, for a minute; ARGS="--seconds 600"
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(or $(ARGS),--seconds 60)

demo: $(STAMP)  ## the main job on real input; ARGS="--preset k8v4 --document FILE"
	$(BIN)/python -m tq_connectors.demo $(ARGS)

bench: $(STAMP)  ## the measurements that run on any machine
	$(BIN)/python benchmarks/eviction.py
	$(BIN)/python benchmarks/presets.py

bench-store: $(STAMP)  ## the store against C clients of Redis, in five minutes; ARGS="--help" explains
	$(BIN)/python -m benchmarks.store $(ARGS)

bench-lmcache: $(STAMP)  ## LMCache's serdes and ours: bytes, speed, error, loading over links
	$(BIN)/python -m benchmarks.lmcache_kv
	PYTHON=$(PYTHON) TORCH="$(TORCH)" tests/engines/lmcache/install.sh $(ENGINE_VENV)
	tests/engines/lmcache/run.sh $(ENGINE_VENV) -m benchmarks.lmcache_serde $(ARGS)

bench-gpu: $(STAMP)  ## GPU kernels against bf16, FP8's limit and peers; ARGS="--help" explains
	$(BIN)/python -m benchmarks.run $(ARGS)

bench-quality: $(STAMP)  ## what compressed caches cost a real model, ours and others'; ARGS="--help" explains
	GOMP_SPINCOUNT=10000 $(BIN)/python -m benchmarks.quality $(ARGS)

proto: $(STAMP)  ## regenerate the RPC code from proto/
	proto/generate.sh

clean:  ## remove the environment and all caches
	rm -rf $(VENV) .venv-* .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis out
