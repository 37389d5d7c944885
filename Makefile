# `make run` and `make test` need Python 3.11 or newer and nothing else; both make .venv themselves.
PYTHON ?= $(shell for p in python3.12 python3.11 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
CONFIG ?= experiments/digits.py

.PHONY: run test test-slow test-matrix lint docs clean

run: .venv/installed  ## the default experiment, on bundled data
	$(BIN)/python -m megajax.run --config $(CONFIG)

test: lint  ## lint, format check, types, doctests and tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/installed-dev  ## the tests that take minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile -m slow

# PYTHON:WHAT IT INSTALLS BESIDE MEGAJAX; the corners of what is supported.
MATRIX ?= 3.11:-r,.ci/oldest.txt 3.12:jax==0.11.2 3.13:
MATRIX_TESTS ?= tests megajax

test-matrix:  ## the fast suite on the oldest and the newest JAX, where there are these Pythons
	@for corner in $(MATRIX); do \
		python=python$${corner%%:*}; bin=.venv-$${corner%%:*}/bin; \
		$$python -c '' 2>/dev/null || { echo "skipped: there is no $$python"; continue; }; \
		echo "$$python $${corner#*:}"; \
		$$python -m venv .venv-$${corner%%:*} || exit 1; \
		$$bin/python -m pip install --quiet --editable ".[dev]" $$(echo $${corner#*:} | tr , ' ') || exit 1; \
		$$bin/python -m pytest -n 2 --dist loadfile -m "not slow" $(MATRIX_TESTS) || exit 1; \
	done

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo --no-cache

docs: .venv/installed-docs  ## the site, in site/; a warning is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

.venv/installed-dev: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch .venv/installed $@

.venv/installed-docs: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch .venv/installed $@

clean:
	rm -rf site .venv .venv-3.* .mypy_cache .ruff_cache .pytest_cache
