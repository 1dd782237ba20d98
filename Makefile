# Every target sets up what it needs. Options: PYTHON=python3.12  CUDA=0|1|auto  CUDA_ARCHS="89-real;90-real"
PYTHON ?= python3
CUDA ?= auto
CUDA_ARCHS ?=
SETUP = $(PYTHON) scripts/setup_env.py --cuda $(CUDA) --cuda-archs "$(CUDA_ARCHS)"
BIN = .venv/bin

.PHONY: run test check demo-model demo-mlx llama faults setup setup-dev clean

run: setup demo-mlx  ## serve on 127.0.0.1:52415 and show a first answer
	@$(BIN)/python scripts/first_answer.py

test: setup-dev demo-model  ## all tests
	$(BIN)/python -m pytest

check: setup-dev  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/python -m pytest tests/test_imports.py

demo-model: setup  ## fetch and assemble the demo model
	@$(BIN)/python scripts/demo_model.py

demo-mlx: demo-model  ## convert the demo model for the MLX runner
	@$(BIN)/python scripts/demo_mlx.py

llama: setup  ## build llama.cpp for this machine

faults: setup-dev  ## kill and stop runners under load and compare every text; FAULTS=200 RUNNER=cuda SEED=0
	$(BIN)/python -m bench.faults $(or $(FAULTS),200) $(or $(RUNNER),cuda) $(or $(SEED),0)

setup:
	@$(SETUP)

setup-dev:
	@$(SETUP) --dev

clean:  ## remove the virtual environment and caches of this checkout
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis src/*.egg-info
