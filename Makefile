# Everything a developer types. Needs make and Python 3.11 or 3.12; the rest goes into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
.PHONY: help demo test test-gpu fuzz lint types venv guests check-guests bench clean

help:
	@echo "make demo    three tenants' guests on one real model, side by side"
	@echo "make test    the whole test suite"
	@echo "make test-gpu  what needs an NVIDIA GPU"
	@echo "make fuzz    attacks made at random for ten minutes (FUZZ_SECONDS=600 FUZZ_SEED=1)"
	@echo "make lint    ruff        make types   mypy"
	@echo "make guests  rebuild the guests' .wasm with zig"
	@echo "make bench   the benchmarks"
	@echo "make clean   remove .venv and caches (imported models stay)"

venv: $(STAMP)

# torch comes first and alone: pip then takes a CPU build from a local wheel folder where one is configured
# (find-links), and the later steps leave it as it is. Elsewhere this gets the index's build.
$(STAMP): pyproject.toml sdk/python/pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || { \
		echo "Realm needs Python 3.11 or 3.12, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e sdk/python -e '.[test]'
	@touch $@

demo: $(STAMP)
	$(BIN)/realm demo

test: $(STAMP)
	$(BIN)/python -m pytest

test-gpu: $(STAMP)
	$(BIN)/python -m pytest tests/gpu

# Binaryen's fuzzer is an npm package; where npm is missing, the report says that it was left out.
FUZZ_SECONDS ?= 600
FUZZ_SEED ?= 1
FUZZ_FINDINGS ?= .cache/fuzz
FUZZ_BINARYEN ?= .cache/binaryen
fuzz: $(STAMP)
	@if command -v npm >/dev/null && [ ! -e $(FUZZ_BINARYEN)/node_modules/.bin/wasm-opt ]; then \
		npm install --silent --no-audit --no-fund --prefix $(FUZZ_BINARYEN) binaryen@132.0.0 || echo "binaryen cannot be installed"; fi
	FUZZ_BINARYEN=$(FUZZ_BINARYEN) $(BIN)/python -m tests.hostile.fuzz \
		--seconds $(FUZZ_SECONDS) --seed $(FUZZ_SEED) --findings $(FUZZ_FINDINGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy host/realm sdk/python/realm_sdk

guests: $(STAMP)
	$(BIN)/python guest_modules/build.py

check-guests: $(STAMP)
	$(BIN)/python guest_modules/build.py --check

bench: $(STAMP)
	$(BIN)/python -m tests.benchmarks.bench_guests
	$(BIN)/python -m tests.benchmarks.bench_worker_tokens
	$(BIN)/python -m tests.benchmarks.bench_engine_loop
	$(BIN)/python -m tests.benchmarks.gateway_frames
	$(BIN)/python -m tests.benchmarks.bench_serving
	$(BIN)/python -m tests.benchmarks.bench_adapters --repeats 1
	$(BIN)/python -m tests.benchmarks.bench_start
	$(BIN)/python -m tests.benchmarks.bench_recovery

clean:
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name '*.egg-info' -type d -prune -exec rm -rf {} +
