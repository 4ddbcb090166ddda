# The two doors of the house. Each makes the environment that it needs in .venv, says what it does, and can be repeated:
#   make demo    quantize the small language model that comes with the repository, compare, write the report
#   make test    run the tests
# and for those who change things: make lint, make docs, make clean.

SHELL := /bin/bash
.DELETE_ON_ERROR:
.PHONY: help demo test lint docs clean

# 3.11 first: the build of torch that the parity tests compare with is made for it.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13; do \
	"$$p" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo "$$p"; break; }; done)
VENV ?= .venv
# Requirements on top of the package's own, such as 'jax>=0.11'.
EXTRA ?=
# Arguments for pytest, such as ARGS='tests/formats -x'.
ARGS ?=
# Processes that share the tests; 0 runs them in one, for a debugger.
WORKERS ?= 2

help:
	@sed -n 's/^#   make/  make/p' Makefile

demo: $(VENV)/.installed-demo
	@echo "== Quantizing the embedded language model"
	@$(VENV)/bin/python examples/demo.py $(ARGS)

test: $(VENV)/.installed-test
	@echo "== Running the tests; 'make test ARGS=-x' passes arguments to pytest"
	@$(VENV)/bin/python -m pytest -n $(WORKERS) --dist worksteal $(ARGS)

lint: $(VENV)/.installed-dev
	@echo "== Style (ruff)"
	@$(VENV)/bin/ruff check .
	@echo "== Types (pyright)"
	@$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python
	@echo "== Layers (import-linter)"
	@$(VENV)/bin/lint-imports

docs: $(VENV)/.installed-docs
	@$(VENV)/bin/mkdocs build --strict --site-dir build/docs

# What is installed is remembered by a stamp for each set of requirements, older than pyproject.toml when that changes,
# and than what the CPU kernels are compiled from.
$(VENV)/.installed-%: pyproject.toml setup.py qjax/kernels/cpu/build.py $(wildcard qjax/kernels/cpu/src/*)
	@test -n "$(PYTHON)" || { echo "qjax needs Python 3.11 or newer with the venv module; none was found."; \
		echo "Install one, or name it: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "== Making the environment $(VENV) with $$($(PYTHON) --version) (the first time takes a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@echo "== Installing qjax and what '$*' needs"
	@$(VENV)/bin/python -m pip install --disable-pip-version-check --editable $(if $(filter demo,$*),'.','.[$*]') $(EXTRA)
	@touch $@

clean:
	rm -rf .venv .venv-next build *.egg-info .pytest_cache .ruff_cache .import_linter_cache .hypothesis qjax/kernels/cpu/*.so
