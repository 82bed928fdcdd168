# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# A CUDA device, if there is one, decides which vLLM is installed; FLAVOUR=cpu|gpu overrides.

PYTHON  ?= python3
FLAVOUR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready-$(FLAVOUR)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test lint format bench gpu-bench lock clean

setup: $(READY)

$(READY): cpu.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "lora_grpo needs Python 3.11 or newer: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
ifeq ($(FLAVOUR),cpu)
	$(BIN)/python -m pip install --quiet --no-deps -r cpu.lock \
	  || $(BIN)/python -m pip install --quiet --no-deps --extra-index-url $(CPU_INDEX) -r cpu.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
else
	$(BIN)/python -m pip install --quiet -e '.[gpu,trl,dev]'
endif
	touch $@

demo: $(READY)
	$(BIN)/lora-grpo demo

test: $(READY)
	$(BIN)/python -m pytest

# Both go on where they were cut off. PART is 1 to 14 (benchmarks/scenarios/gpu-PART.toml says what is in it);
# `lora-grpo bench report --out DIR --join DIR-OF-PART ...` makes one report of them, break-even included.
bench: $(READY)
	$(BIN)/lora-grpo bench all --scenario benchmarks/scenarios/cpu.toml --out benchmarks/results/cpu-$(shell nproc)-cores

GPU_NAME ?= gpu
gpu-bench: $(READY)
	$(BIN)/lora-grpo bench all --scenario benchmarks/scenarios/gpu-$(PART).toml --out benchmarks/results/$(GPU_NAME)-part-$(PART)

lint: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock:
	$(PYTHON) -m venv .venv-lock && .venv-lock/bin/python -m pip install --quiet --upgrade pip
	.venv-lock/bin/python .ci/lock.py > cpu.lock.new && mv cpu.lock.new cpu.lock
	rm -rf .venv-lock

clean:
	rm -rf $(VENV)
