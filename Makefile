# SPDX-License-Identifier: Apache-2.0
# make demo   a real model, fine-tuned, compressed, served and asked
# make test   all tests that need no GPU
# Each sets up .venv first: vLLM's CPU build and this project, editable.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test lint clean

demo: .venv/ready
	$(BIN)/python benchmarks/demo.py

test: .venv/ready
	$(BIN)/pytest

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
