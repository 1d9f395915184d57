# SPDX-License-Identifier: Apache-2.0
# make demo   a real model, fine-tuned, compressed, served and asked
# make test   the tests that need no GPU, two files of them at a time
# make test-slow   the long ones of them; .ci/run runs both
# make test-v2   all tests with an engine again, with Model Runner V2 (half an hour)
# make bench  short versions of the benchmarks, and all figures and tables again
# make bench-check   are deltas slower than they were on this kind of machine?
# make site   the documents as a web site, in .cache/site
# Each sets up .venv first: vLLM's CPU build and this project, editable.

PYTHON ?= python3
BIN := .venv/bin
PYTEST := $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder
V2 := VLLM_USE_V2_MODEL_RUNNER=1

.PHONY: demo test test-slow test-v2 bench bench-check site lint clean

demo: .venv/ready
	$(BIN)/python -m benchmarks.demo

test: .venv/ready
	$(PYTEST) -m "not slow and not timing"
	$(BIN)/pytest -m timing
	$(V2) $(PYTEST) -m "v2 and not slow"

test-slow: .venv/ready
	$(PYTEST) -m "slow and not timing" --durations 20
	$(V2) $(PYTEST) -m "v2 and slow"

test-v2: .venv/ready
	$(V2) $(PYTEST) -m "vllm and not timing"

# Measured anew into .cache/bench; the documents have benchmarks/results.
bench: .venv/ready
	rm -rf .cache/bench
	$(BIN)/python -m benchmarks.quality.quality --short --output-dir .cache/bench
	$(BIN)/python -m benchmarks.ops.cpu --short --output .cache/bench/cpu.csv
	$(BIN)/python -m benchmarks.serving.serving --output-dir .cache/bench --models 2 \
	  --popularity uniform --arrivals closed --lengths 32:24 --num-prompts 16
	$(BIN)/python -m benchmarks.documents.figures

bench-check: .venv/ready
	$(BIN)/python -m benchmarks.check

site: .venv/ready
	$(BIN)/pip install --quiet --group docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/ready: pyproject.toml .ci/install_cpu.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo "Setting up .venv: vLLM's CPU build, about 1.5 minutes" >&2
	@$(PYTHON) -m venv .venv
	@$(BIN)/python .ci/install_cpu.py
	@touch $@

clean:
	rm -rf .venv .cache
