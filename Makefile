# Every target sets up what it needs. Options: PYTHON=python3.12  CUDA=auto|prebuilt|build|0  CUDA_ARCHS="89-real;90-real"
PYTHON ?= python3
CUDA ?= auto
CUDA_ARCHS ?=
SETUP = $(PYTHON) scripts/setup_env.py --cuda $(CUDA) --cuda-archs "$(CUDA_ARCHS)"
BIN = .venv/bin
# In the order of the folders. Otherwise files with the fewest tests, which are often the slowest, would come last.
# Three files at once on two cores, because tests wait for a quarter of their time: for deadlines, watchdogs, processes.
DIST = --dist loadfile --no-loadscope-reorder

.PHONY: run test test-fast check demo-model llama cuda-plugin faults bench bench-peers bench-server gpu-archive gpu-check docs wheels screenshots setup setup-dev setup-clients setup-peers setup-ray setup-vllm clean

run: setup demo-model  ## serve on 127.0.0.1:52415 and show a first answer
	@$(BIN)/python scripts/first_answer.py

test: setup-clients demo-model  ## all tests; those of vLLM and Ray run where make setup-vllm and make setup-ray have made the environments
	$(BIN)/python -m pytest --numprocesses $(or $(WORKERS),3) $(DIST)

test-fast: setup-dev  ## the unit tests: one module at a time, no process started
	$(BIN)/python -m pytest --numprocesses $(or $(WORKERS),2) $(DIST) tests/unit

check: setup-dev  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-logo

demo-model: setup  ## fetch the demo model, and convert it for the MLX runner
	@$(BIN)/exo setup demo

llama: setup  ## build llama.cpp for this machine, with the CUDA plug-in if there is an NVIDIA driver

cuda-plugin: setup  ## compile the CUDA plug-in, also on a machine without a GPU; CUDA_ARCHS=90-real
	$(BIN)/python -m exo setup cuda --source build --archs "$(CUDA_ARCHS)"

faults: setup-dev demo-model  ## kill, stop and flood under load and check every token; MODEL=tiny|demo RUNNER=cuda|mlx FAULTS=200 SEED=0 JSON=file
	$(BIN)/python -m bench.faults --seed $(or $(SEED),0) $(if $(MODEL),--model $(MODEL)) $(if $(RUNNER),--runner $(RUNNER)) \
		$(if $(FAULTS),--kills $(FAULTS)) $(if $(JSON),--json $(JSON))

bench: setup  ## measure an OpenAI-compatible server; URL=http://127.0.0.1:52415 MODEL=gemma-3-270m ARGS="--concurrency 1,4 --goodput ttft:1000"
	$(BIN)/exo bench $(or $(URL),http://127.0.0.1:52415) --model $(or $(MODEL),gemma-3-270m) $(ARGS)

bench-peers: setup-peers demo-model  ## exo beside llama-server, llama-cpp-python and mlx_lm.server; writes docs/performance.md and docs/one_user.md; PAIRS=5 ARGS=--tiny
	$(BIN)/python -m bench.peers --pairs $(or $(PAIRS),5) $(ARGS)
	$(BIN)/python -m bench.one_user --pairs $(or $(PAIRS),5)

bench-server: setup-dev  ## what the server path costs, with the fake runner; PAIRS=5
	$(BIN)/python -m bench.server_path --pairs $(or $(PAIRS),5)

gpu-archive: setup  ## compile and pack for a machine with a GPU and no network; ARGS="--archs 90-real --python 3.12"
	$(BIN)/python scripts/gpu_archive.py $(ARGS)

gpu-check:  ## on such a machine: test, measure, see docs/gpu.md; ARGS="--stages self-test,contract"
	PYTHON=$(PYTHON) scripts/gpu_check $(ARGS)

wheels: setup  ## build/wheels/: exo, and its llama.cpp runner for upstream exo; exo is tried in an empty environment: llama.cpp, the demo model, an answer
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir build/wheels .
	$(BIN)/python scripts/runner_wheel.py build/wheels
	$(PYTHON) -m venv --clear build/empty
	build/empty/bin/pip install --quiet --constraint requirements.txt build/wheels/exo-*.whl
	cd build && empty/bin/exo setup llama && empty/bin/exo setup demo && empty/bin/exo run gemma-3-270m "The capital of France is"

docs:  ## the documentation as a site in build/site; a broken link fails
	@$(PYTHON) scripts/setup_env.py --docs
	.venv-docs/bin/mkdocs build

screenshots: setup-dev demo-model  ## docs/screenshots/: the page in Chromium, on a server with the demo model
	$(BIN)/python scripts/screenshots.py

setup:
	@$(SETUP)

setup-dev:
	@$(SETUP) --dev

setup-clients:
	@$(SETUP) --dev --clients

setup-peers: setup-dev
	@$(BIN)/python scripts/setup_env.py --peers

setup-ray:  ## the environment of Ray for exo serve --ray, .venv-ray: 300 MB
	@$(PYTHON) scripts/setup_env.py --ray

setup-vllm:  ## the vLLM runner's own environment, .venv-vllm: 3 GB on a CPU, more with CUDA
	@$(SETUP) --vllm

clean:  ## remove the virtual environment and caches of this checkout
	rm -rf .venv .venv-clients .venv-docs .venv-peers .venv-ray .venv-vllm .pytest_cache .ruff_cache .hypothesis src/*.egg-info
