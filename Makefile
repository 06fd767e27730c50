# `make demo` and `make test` do all set-up on a fresh machine; all they need is Python 3.11 or newer, make and git.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
ARGS ?=
# Many tests wait for processes they started, so two at a time are quicker even on two cores.
TESTS_AT_ONCE ?= 2

# Compiled bytecode halves the start of every process, so a wish for none is not passed on.
unexport PYTHONDONTWRITEBYTECODE
unexport PYTHONPATH

.PHONY: help setup demo test test-slow check docs bench lock clean

help:
	@echo 'make demo       the whole way through on this machine; ARGS="--quick" for a short one'
	@echo 'make test       the tests; ARGS="-k name" for some of them'
	@echo 'make test-slow  the long ones'
	@echo 'make check      lint, format, types, direction of imports, the docs'
	@echo 'make docs       the documentation, to build/site/index.html'
	@echo 'make bench      the benchmarks'
	@echo 'make lock       resolve requirements.lock anew'

setup: $(READY)

# Every step can be interrupted and run again; uv itself comes through pip, at the version the lock names.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "Python 3.11 or newer is needed, but $(PYTHON) is: $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 ..." >&2; exit 1; }
	@echo 'setting up $(VENV) ...'
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || { \
	  echo "python3 -m venv doesn't work here; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@$(BIN)/uv --version >/dev/null 2>&1 || $(BIN)/python -m pip install -q --disable-pip-version-check "$$(grep '^uv==' requirements.lock)"
	@$(BIN)/uv pip sync -q --python $(BIN)/python --compile-bytecode requirements.lock
	@$(BIN)/uv pip install -q --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@touch $@

demo: $(READY)
	@$(BIN)/vitrail demo $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest -q -m 'not slow' -n $(TESTS_AT_ONCE) --dist loadfile $(ARGS)

test-slow: $(READY)
	@$(BIN)/python -m pytest -q -m slow $(ARGS)

check: $(READY)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy --cache-dir=/dev/null
	@$(BIN)/python -m pytest -q tests/contract/test_imports.py
	@$(MAKE) --no-print-directory docs

# Strict: a link that leads nowhere, or a page that no menu has, is an error.
docs: $(READY)
	@NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true $(BIN)/mkdocs build --quiet

bench: $(READY)
	@$(BIN)/python -m benchmarks $(ARGS)

lock:
	@$(BIN)/uv --version >/dev/null 2>&1 || $(MAKE) --no-print-directory setup
	@$(BIN)/uv pip compile -q --universal --python-version 3.11 --extra dev --no-header --no-annotate --no-emit-index-url \
	  --upgrade pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build *.egg-info
