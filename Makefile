# make demo and make test start from a bare clone: they make a virtual environment and install into it.
#
# TORCH names the torch to install first. An unpinned torch on Linux comes with several gigabytes of CUDA
# libraries; set TORCH=torch to take the newest one all the same.
PYTHON ?= python3
VENV   ?= .venv
TORCH  ?= torch==2.13.0
BIN    := $(VENV)/bin
JOBS   ?= 2
OPS    ?= covariance low_rank solve neuron_select masked_update ties retrieval routing
WHOLE  ?= memory_editing serving

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: help demo test test-all lint format bench gpu-test clean

help:            ## show this list
	@grep -hE '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.installed  ## edit facts in the packaged model and show what happened
	$(BIN)/fastedit demo

test: $(VENV)/.test  ## run the test suite
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m "not slow"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(JOBS) --dist worksteal -m slow

lint: $(VENV)/.test  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test  ## let ruff rewrite the sources
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.test  ## run the CPU benchmarks and write bench/results
	for stem in $(OPS); do $(BIN)/python bench/$$stem.py --device cpu --plot bench/results/$${stem}_cpu.png || exit; done
	for stem in $(WHOLE); do $(BIN)/python bench/$$stem.py --device cpu || exit; done

gpu-test:        ## build, test and benchmark on the GPU of this machine
	bash bench/gpu_check.sh

clean:           ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist *.egg-info fastedit/_C*.so

# -- environments --------------------------------------------------------------------------------------

SOURCES := pyproject.toml setup.py $(shell find csrc -type f 2>/dev/null)

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip "setuptools>=77"

$(VENV)/.torch: | $(BIN)/python
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install -q $(TORCH)
	touch $@

$(VENV)/.installed: $(SOURCES) | $(VENV)/.torch
	$(BIN)/pip install -q -e .
	touch $@

$(VENV)/.test: $(SOURCES) | $(VENV)/.torch  # one build serves demo, tests and linters
	$(BIN)/pip install -q -e '.[test,lint]'
	touch $@ $(VENV)/.installed
