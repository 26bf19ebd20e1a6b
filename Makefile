# Two commands do all the set-up: `make demo` and `make test`. Each makes .venv with pip on first use.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-slow test-exports lint notebook docs clean

demo: $(VENV)/.demo
	$(BIN)/mpq demo

test: $(VENV)/.test
	$(BIN)/python -m pytest

test-slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

# Each exporter with its real tool, in a virtual environment of its own; TOOLS="mlx torchao" runs some.
test-exports: $(VENV)/.test
	.ci/test-exports $(TOOLS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Run the notebooks in place, so that its stored output is real.
notebook: $(VENV)/.test
	$(BIN)/python -m jupyter execute --inplace --timeout=600 notebooks/*.ipynb

# The documentation into site/, warnings as errors. Its code blocks are run by the slow tests.
docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

$(VENV)/.demo: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[test]'
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(BIN)/python pyproject.toml
	$(BIN)/python -m pip install --quiet -e '.[docs]'
	touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .venv-exports build dist site *.egg-info demo
