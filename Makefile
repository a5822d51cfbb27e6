# make demo   environment, embedded data, training, pictures, export: the main job on a fresh machine
# make test   environment, then every test that needs no GPU
# make long   the campaigns that `make test` leaves out, for an hour or more
# make gpu    the GPU tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
RUN := runs/captioned_shapes
# Tests keep to one thread each, and some wait for other processes: three workers keep two cores busy.
# A worker takes neighbours, since a file's tests share what is dear to set up.
WORKERS ?= 3
# What Python compiles of this project's own is kept.
unexport PYTHONDONTWRITEBYTECODE
# A machine with a GPU tests what needs none as any other does.
NO_GPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: env demo compiler test long gpu lint
.DEFAULT_GOAL := test

env: $(VENV)/.ready

# torch first: deepspeed looks for it while it is being built. A release of torch already on disk is taken as it is.
# All is compiled at once, by every core, where pip would use one: with PYTHONDONTWRITEBYTECODE set, as in many
# containers, Python would compile what it imports at every start. What does not compile is never imported.
$(VENV)/.ready: setup.py constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "duotone: needs Python 3.11 or 3.12; pass PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c constraints.txt setuptools wheel
	$(BIN)/pip install -q --no-compile -c constraints.txt torch numpy
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing)/' $(VENV)/lib || true
	touch $@

demo: env
	$(BIN)/deepspeed recipes/coco_clip.py
	$(BIN)/duotone export $(RUN) --format safetensors --out $(RUN)/exported-$$(date +%s).safetensors
	$(BIN)/duotone sample $$(ls -t $(RUN)/exported-*.safetensors | head -n 1) --overwrite --out $(RUN)/sample.png --count 8 \
		--prompt "a red circle on a blue background" "a yellow triangle on a black background" "a white square on a green background"
	$(BIN)/duotone evaluate $(RUN) --json $(RUN)/evaluation.json
	@echo "pictures: $(RUN)/previews and $(RUN)/sample.png    weights: $(RUN)/ema.safetensors"

# What torch.compile and Triton build with; a CPU that trains needs neither.
compiler:
	@command -v g++ > /dev/null && $(PYTHON) -c 'import os, sys, sysconfig as s; sys.exit(not os.path.exists(s.get_path("include") + "/Python.h"))' \
		|| { echo "duotone: the tests need g++ and Python.h (Debian: apt-get install g++ python3-dev)"; exit 1; }

test: compiler env
	$(BIN)/ruff check .
	$(NO_GPU) TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "not gpu and not long"
	$(NO_GPU) $(PYTEST) tests --ignore tests/kernels -m "not gpu and not long"

long: compiler env
	$(NO_GPU) TRITON_INTERPRET=1 $(PYTEST) tests/kernels -m "long and not gpu"
	$(NO_GPU) $(PYTEST) tests --ignore tests/kernels -m "long and not gpu"

gpu: compiler env
	$(BIN)/python -m pytest tests -m gpu

lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
