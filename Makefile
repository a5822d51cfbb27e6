# make demo   environment, embedded data, training, pictures, export: the main job on a fresh machine
# make test   environment, then the tests that need no GPU
# make long   the long tests that `make test` leaves out; takes an hour or more
# make gpu    the GPU tests
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# constraints-oldest.txt has the oldest versions that setup.py admits.
CONSTRAINTS ?= constraints.txt
RUN := runs/captioned_shapes
# Each test uses one thread, and some wait for other processes: three workers keep two cores busy.
# worksteal gives neighbouring tests to one worker, because the tests of a file share expensive set-up.
WORKERS ?= 3
# Python keeps the bytecode of this project's own files.
unexport PYTHONDONTWRITEBYTECODE
# Tests that need no GPU run on the CPU even on a machine that has one.
NO_GPU := CUDA_VISIBLE_DEVICES= DS_ACCELERATOR=cpu
PYTEST := $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.PHONY: env demo compiler test long gpu lint
.DEFAULT_GOAL := test

env: $(VENV)/.ready

# torch comes first because deepspeed's build imports it. A suitable torch that is already installed is kept.
# All bytecode is compiled at the end by every core; pip would use only one. Without it, where PYTHONDONTWRITEBYTECODE
# is set, as in many containers, Python would compile its imports at every start. Files that fail to compile are never
# imported, so their errors are ignored.
$(VENV)/.ready: setup.py $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 13) else "duotone: needs Python 3.11 or 3.12; pass PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) setuptools wheel
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) torch numpy
	$(BIN)/pip install -q --no-compile -c $(CONSTRAINTS) -e '.[dev]'
	$(BIN)/python -m compileall -qq -j 0 -x '/(tests?|testing)/' $(VENV)/lib || true
	touch $@

demo: env
	$(BIN)/deepspeed recipes/coco_clip.py
	$(BIN)/duotone export $(RUN) --format safetensors --out $(RUN)/exported-$$(date +%s).safetensors
	$(BIN)/duotone sample $$(ls -t $(RUN)/exported-*.safetensors | head -n 1) --overwrite --out $(RUN)/sample.png --count 8 \
		--prompt "a red circle on a blue background" "a yellow triangle on a black background" "a white square on a green background"
	$(BIN)/duotone evaluate $(RUN) --json $(RUN)/evaluation.json
	@echo "pictures: $(RUN)/previews and $(RUN)/sample.png    weights: $(RUN)/ema.safetensors"

# torch.compile and Triton need these to build; training on a CPU needs neither.
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
