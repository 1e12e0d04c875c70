# make alone lists the words. Settings, all optional:
#   PYTHON=python3.11   the Python that a new environment is made with: 3.10 to 3.13
#   VENV=.venv          where that environment is made
#   TORCH=2.11.0        another torch than constraints.txt names, such as the one your cluster's driver wants. It is kept by
#                       later makes. A build for one CUDA version comes from the index that pip's own settings name
#                       (PIP_INDEX_URL, PIP_EXTRA_INDEX_URL or pip.conf).
# An active virtual or conda environment is used as it is, and its torch is kept: on clusters somebody chose it with care.
# Conda's base environment is nobody's choice, so it is left alone. VENV=… on the command line overrides both.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-dali test-slurm test-transformers-floor lint bench golden ci

PYTHON := python3
VENV := .venv
TORCH :=

CONDA := $(if $(filter-out base,$(CONDA_DEFAULT_ENV)),$(CONDA_PREFIX))
ACTIVE := $(if $(filter command line,$(origin VENV)),,$(or $(VIRTUAL_ENV),$(CONDA)))
ENVIRONMENT := $(or $(ACTIVE),$(VENV))
PY := "$(ENVIRONMENT)/bin/python"

# The oldest transformers that setup.cfg allows, with what it needs in other versions than constraints.txt names.
FLOOR := transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 httpcore==1.0.9 certifi==2026.10.18
FLOOR_FOLDER := .cache/transformers-5.17.0

help:  ## lists these words
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## /\1\t/' | while IFS=$$'\t' read -r word sentence; do printf 'make %-24s %s\n' "$$word" "$$sentence"; done

# Two files in the environment remember what was done: gesture-clips.torch the torch that was chosen or found, gesture-clips.installed
# a sum over everything that decides what gets installed; it is removed first and written last, so an interrupted install starts again.
install:  ## makes .venv (or takes the active environment) and installs everything; does nothing when nothing changed
	@environment="$(ENVIRONMENT)"; active="$(ACTIVE)"; torch="$(TORCH)"
	done="$$environment/gesture-clips.installed"; chosen="$$environment/gesture-clips.torch"
	[ -n "$$torch" ] || torch=$$(cat "$$chosen" 2>/dev/null || true)
	sum() { { printf '%s\n' "$$PWD" "$$torch" && cat setup.cfg pyproject.toml constraints.txt; } | cksum; }
	if [ "$$(cat "$$done" 2>/dev/null)" = "$$(sum)" ] && $(PY) -c '' 2>/dev/null; then exit 0; fi
	fits() { "$$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; }
	python=$${active:+$$active/bin/python}; python=$${python:-$(PYTHON)}
	if ! fits "$$python"; then
		found=$$(command -v "$$python" >/dev/null && "$$python" --version 2>&1 || echo "not found")
		echo "$$python: expected Python 3.10 to 3.13; it is $$found." >&2
		for other in python3.12 python3.11 python3.10 python3.13; do
			if fits "$$other"; then echo "Type: $${active:+deactivate; }make install PYTHON=$$other" >&2; exit 2; fi
		done
		echo "Install or load one (on a cluster: module avail python), then type: make install PYTHON=/path/to/python3.11" >&2; exit 2
	fi
	if [ -z "$$active" ] && ! { fits $(PY) && $(PY) -m pip --version >/dev/null 2>&1; }; then
		if [ -e "$$environment" ] && [ ! -e "$$environment/pyvenv.cfg" ] && [ -n "$$(ls -A "$$environment")" ]; then
			echo "$$environment: is a folder but no virtual environment. Remove it, or type: make install VENV=another-folder" >&2; exit 2
		fi
		"$$python" -m venv --clear "$$environment"
	fi
	if [ -n "$$active" ] && [ -z "$$torch" ]; then
		torch=$$($(PY) -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
	fi
	rm -f "$$done"
	limits=$$(mktemp); trap 'rm -f "$$limits"' EXIT
	sed "$${torch:+s/^torch==.*/torch==$$torch/}" constraints.txt >"$$limits"
	echo "installing into $$environment, with torch $${torch:-as in constraints.txt}: minutes, and up to 5 GB where torch brings CUDA"
	$(PY) -m pip install -q --disable-pip-version-check -c "$$limits" -e '.[train,dev]'
	echo "$$torch" >"$$chosen"
	sum >"$$done"

demo: install  ## runs the whole way on made-up snippets: make, pack, verify, train, predict
	@$(PY) -m benchmarks demo --output build/demo

test: install  ## runs the tests
	@$(PY) -m pytest

test-slow: install  ## runs what takes minutes: both tiny models learn motion over seeds, a step of each base model
	@$(PY) -m pytest -m slow

test-dali: install  ## installs NVIDIA DALI too (0.5 GB to fetch, 1 GB on disk) and runs its tests and the loaders' contract with it; no GPU needed
	@extra=$$($(PY) -c 'import torch; print("dali-cuda13" if (torch.version.cuda or "12") >= "13" else "dali")')
	$(PY) -m pip install -q --disable-pip-version-check -c constraints.txt -e ".[$$extra]"
	$(PY) -m pytest -q tests/test_dali*.py tests/test_loaders.py -k dali

test-slurm: install  ## starts a real SLURM of two nodes on this machine (root; installs Debian's packages) and runs the scripts on it
	@$(PY) -m pytest -m slurm tests/slurm

test-transformers-floor: install  ## runs the models' tests with the oldest transformers that is allowed
	@if [ "$$(cat $(FLOOR_FOLDER)/complete 2>/dev/null)" != "$(FLOOR)" ]; then
		rm -rf $(FLOOR_FOLDER)
		$(PY) -m pip install -q --disable-pip-version-check --no-deps --target $(FLOOR_FOLDER) $(FLOOR)
		echo "$(FLOOR)" >$(FLOOR_FOLDER)/complete
	fi
	PYTHONPATH="$$PWD/$(FLOOR_FOLDER)" $(PY) -c 'import transformers; assert transformers.__version__ == "5.17.0", transformers.__version__'
	PYTHONPATH="$$PWD/$(FLOOR_FOLDER)" $(PY) -m pytest -q tests/test_models*.py

lint: install  ## runs ruff and mypy
	@$(PY) -m ruff check .
	$(PY) -m mypy

bench: install  ## measures the loaders on made-up clips
	@$(PY) -m benchmarks loader --quick

golden: install  ## writes tests/golden anew; look at the diff before you commit it
	@$(PY) -m pytest -m golden --update-golden

ci: lint test-transformers-floor test-slow test-slurm test-dali test  ## runs what every change must pass
