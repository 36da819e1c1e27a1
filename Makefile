PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
THREADS ?= 1
PYTHON_IS_NEW = @$(PYTHON) -c 'import sys; v = sys.version.split()[0]; sys.exit(None if sys.version_info >= (3, 11) \
	else "error: ftw needs Python 3.11 or newer, and $(PYTHON) is " + v + ": make PYTHON=python3.12 ...")'

.PHONY: demo check test test-slow test-transformers-4 bench bench-gpu real-data docs format lint types clean

demo: $(VENV)/demo.stamp
	$(BIN)/python -m ftw_torch.demo

check: lint types test

test: $(VENV)/test.stamp
	$(BIN)/python -m ftw_compiled
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n 2 -m "not slow"

test-transformers-4: $(VENV)-transformers-4/test.stamp
	OMP_NUM_THREADS=$(THREADS) $(VENV)-transformers-4/bin/python -m pytest -m "not slow" tests/torch/test_trainer*.py

test-slow: $(VENV)/test.stamp
	$(BIN)/python -m pytest -m slow

bench: $(VENV)/test.stamp
	$(BIN)/python -m ftw_conformance bench

bench-gpu: $(VENV)/test.stamp
	$(BIN)/python -m ftw_conformance bench gpu

real-data: $(VENV)/test.stamp
	$(BIN)/python -m ftw_conformance real-data

docs: $(VENV)/docs.stamp
	$(BIN)/sphinx-build -W --keep-going -q -b html docs docs/_build/html
	@echo docs/_build/html/index.html

format: $(VENV)/test.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lint: $(VENV)/test.stamp
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/test.stamp
	$(BIN)/mypy
	$(BIN)/pyright

clean:
	rm -rf $(VENV) $(VENV)-transformers-4 build dist docs/_build docs/api/generated

# Packages come in groups, so that the demo does not wait for what only the tests need.
$(VENV)/bin/python:
	$(PYTHON_IS_NEW)
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade "pip>=25.1"

$(VENV)/demo.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[torch]"
	touch $@

$(VENV)/test.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[all,bench,examples]" --group test --group lint
	touch $@

$(VENV)-transformers-4/test.stamp: pyproject.toml constraints.txt
	$(PYTHON_IS_NEW)
	$(PYTHON) -m venv $(VENV)-transformers-4
	$(VENV)-transformers-4/bin/python -m pip install --quiet --upgrade "pip>=25.1"
	$(VENV)-transformers-4/bin/python -m pip install --quiet -c constraints.txt -e ".[all,bench,examples]" --group test "transformers==4.57.*"
	touch $@

$(VENV)/docs.stamp: $(VENV)/bin/python pyproject.toml constraints.txt
	$(PIP) -e ".[all]" --group docs
	touch $@
