# Two commands do all the set-up on a fresh machine: `make demo` and `make test`.
# A CUDA device, if there is one, decides which vLLM is installed; FLAVOUR=cpu|gpu overrides.

PYTHON  ?= python3
FLAVOUR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.ready-$(FLAVOUR)
CPU_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: setup demo test models reference lint format bench gpu-bench gpu-kit lock clean

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
	$(BIN)/python -m pip install --quiet -e '.[gpu,trl,quantized,dev]'
endif
	touch $@

demo: $(READY)
	$(BIN)/lora-grpo demo

# Two processes, a file at a time each: engines that tests of one file share start once.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# A real engine on a tiny model of every family; writes examples/docs/models.md.
models: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.model_table

# Public names, settings and commands, from the code; writes examples/docs/reference.md.
reference: $(READY)
	$(BIN)/python -m tests.reference_page

# Both go on where they were cut off.
bench: $(READY)
	$(BIN)/lora-grpo bench all --scenario benchmarks/scenarios/cpu.toml --out benchmarks/results/cpu-$(shell nproc)-cores

GPU_NAME ?= gpu
gpu-bench: $(READY)
	$(BIN)/python benchmarks/gpu/run.py --out benchmarks/results/$(GPU_NAME)

# What a GPU host needs besides the code where it is not a checkout: the demo's base, and which commit it is.
gpu-kit: $(READY)
	XDG_CACHE_HOME=.gpu $(BIN)/python -c 'from lora_grpo.demo import ensure_base; print(ensure_base())'
	git describe --always --abbrev=7 --exclude='*' --dirty=+ > .gpu/commit

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
