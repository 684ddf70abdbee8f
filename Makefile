# make demo       convert, calibrate, export and run the model in examples/models: the first look
# make test       the test suite for every day (needs no GPU)
# make test-all   what CI runs: lint, types, oldest versions, the whole suite
# make sparse-tables  the README's four tables of sparse presets; rows that are measured stay
# make onnx-library   our own kernels for ONNX Runtime on CPUs (g++ and its C++ headers)
#
# Each makes the environment it needs in $(VENV), once, and again when pyproject.toml or
# constraints.txt change.

PYTHON ?= python3
VENV ?= .venv
VENV_MIN ?= .venv-min
PYTEST_ARGS ?=
# The oldest versions that pyproject.toml admits; tests/test_packaging.py holds the two together.
MIN_TORCH := 2.11.0
MIN_TRANSFORMERS := 5.11.0

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# One thread per worker: two workers with two threads each would fight over two cores.
RUN_TESTS := OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A worker that is done takes tests from the other: some tests take a minute.
WORKERS := -n 2 --dist worksteal
SETTINGS := pyproject.toml constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format smoke-min suite sparse-tables onnx-library clean

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

demo: $(VENV)/.ready-demo
	$(BIN)/python examples/demo.py

test: $(VENV)/.ready-dev
	$(RUN_TESTS) $(BIN)/python -m pytest $(WORKERS) -m "not slow and not gpu" $(PYTEST_ARGS)

# Types and the oldest versions keep one core busy each: side by side, once the first environment
# stands (two editable installations at once would write into the same folder). The whole suite comes
# last, so that its closing line is the last thing on the screen.
test-all: $(VENV)/.ready-dev
	$(MAKE) --jobs 2 --output-sync=target lint smoke-min
	$(MAKE) suite

suite: $(VENV)/.ready-dev
	$(RUN_TESTS) $(BIN)/python -m pytest $(WORKERS) --timeout=900 $(PYTEST_ARGS)

# Ruff and mypy as hooks of .pre-commit-config.yaml, on every file that git knows; without git (an
# unpacked archive) the same three commands. The hooks use the tools of this environment: nothing is
# downloaded. What ruff can correct is corrected, and fails.
lint: $(VENV)/.ready-dev
	if git rev-parse --git-dir >/dev/null 2>&1; then \
		PATH="$(abspath $(BIN)):$$PATH" PRE_COMMIT_HOME="$(abspath $(VENV))/pre-commit" \
			$(BIN)/pre-commit run --all-files --show-diff-on-failure; \
	else \
		$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/python .ci/typecheck.py; \
	fi

# From nothing some hours on a CPU; what is interrupted goes on. `--fresh` at one of them begins anew.
SHIPPED := --rows 12 --seed 0 --device cpu
sparse-tables: $(VENV)/.ready-demo
	$(BIN)/python examples/sparse_table.py --model examples/models/pycode-gqa \
		--out examples/results/sparse_table.json $(SHIPPED)
	$(BIN)/python examples/sparse_recall.py --model examples/models/recall-llama \
		--out examples/results/sparse_recall.json $(SHIPPED) --tokens 1024
	$(BIN)/python examples/sparse_images.py --out examples/results/sparse_images.json --seed 0
	$(BIN)/python examples/sparse_diffusion.py --model examples/models/blanks \
		--out examples/results/sparse_diffusion.json --rows 256 --seed 0 --device cpu

onnx-library:
	$(PYTHON) kernels/csrc/build.py

format: $(VENV)/.ready-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch for CUDA is the only build of that version on the package index: 3 GB to download.
smoke-min: $(VENV_MIN)/.ready
	$(RUN_TESTS) $(VENV_MIN)/bin/python -m pytest -m smoke --timeout=300 $(PYTEST_ARGS)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "reattend needs Python 3.11 or newer: make ... PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.ready-demo: $(SETTINGS) | $(VENV)/bin/python
	$(PIP_INSTALL) torch==2.13.0 -c constraints.txt
	$(PIP_INSTALL) -e '.[onnx,plots]' -c constraints.txt
	@touch $@

$(VENV)/.ready-dev: $(SETTINGS) | $(VENV)/bin/python
	$(PIP_INSTALL) torch==2.13.0 -c constraints.txt
	$(PIP_INSTALL) -e '.[dev]' -c constraints.txt
	@touch $@ $(VENV)/.ready-demo

$(VENV_MIN)/.ready: $(SETTINGS)
	rm -rf $(VENV_MIN)
	$(PYTHON) -m venv $(VENV_MIN)
	grep -viE '^(torch|transformers|triton|setuptools|huggingface_hub|tokenizers)==' \
		constraints.txt > $(VENV_MIN)/constraints.txt
	$(VENV_MIN)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==$(MIN_TORCH) -c $(VENV_MIN)/constraints.txt
	$(VENV_MIN)/bin/python -m pip install --quiet --disable-pip-version-check \
		torch==$(MIN_TORCH) transformers==$(MIN_TRANSFORMERS) -e '.[dev]' \
		-c $(VENV_MIN)/constraints.txt
	@touch $@

clean:
	rm -rf .venv .venv-ci .venv-min build dist demo-out *.egg-info
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
