# `make demo` and `make test` do all the set-up on a fresh machine: Python >= 3.11 and nothing else.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0

# The newest Python that is installed, if it is newer than the one above: for `make test-newest`.
NEWEST ?= $(shell for p in python3.14 python3.13 $$HOME/.pyenv/versions/3.1[34].*/bin/python; do \
	$$p -c "" 2>/dev/null && echo $$p && break; done)
PART ?= tests/test_imports.py tests/pallas_kernels/ms_deform_attn/test_api.py tests/pallas_kernels/ms_deform_attn/test_gpu.py \
	tests/pallas_kernels/ms_deform_attn/test_reference.py tests/detr_jax/test_train_step.py tests/detr_jax/test_cli.py \
	tests/detr_jax/checkpoints/test_store.py tests/detr_jax/test_matching.py

.PHONY: demo picture test test-newest test-slow test-aot mutants notebooks parity lint docs clean

# Huge pages make a step on the CPU an eighth shorter on Linux; other systems ignore the variable.
demo: export GLIBC_TUNABLES := glibc.malloc.hugetlb=1
demo: $(VENV)/.installed
	$(BIN)/python train.py --config configs/bccd.py
	$(BIN)/python eval.py --checkpoint runs/bccd --pictures runs/bccd/pictures --results runs/bccd/results.json

# The picture of the README, with the model of `make demo`.
picture: $(VENV)/.installed
	test -d runs/bccd/checkpoints || $(MAKE) demo
	$(BIN)/python docs/draw_demo.py

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest

# A part of the tests with the newest Python and the newest jax; `make test-newest PART=` runs all.
test-newest:
	@test -n "$(NEWEST)" || echo "no newer Python is installed: nothing to do"
	test -z "$(NEWEST)" || $(MAKE) VENV=$(VENV)-newest PYTHON=$(NEWEST) $(VENV)-newest/.installed-test
	test -z "$(NEWEST)" || $(VENV)-newest/bin/python -m pytest $(PART)

test-slow: $(VENV)/.installed-test
	$(BIN)/python -m pytest -m slow

# The TPU kernels, compiled for five generations of TPUs that this machine does not have.
test-aot: $(VENV)/.installed-test
	$(BIN)/pip install --quiet --editable '.[tpu]'
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -m slow tests/pallas_kernels tests/detr_jax/test_plan.py

# Changes to the code that a test must notice, one by one.
mutants: $(VENV)/.installed-test
	$(BIN)/python tests/mutants.py

# Each one in its short form, from a clean kernel, on the wheel.
notebooks: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n 0 -m slow tests/test_notebooks.py

parity: $(VENV)/.installed-parity
	$(BIN)/python -m pytest -m parity

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# The pages of `docs/` with the API from the docstrings, into `site/`; a broken link is an error.
docs: $(VENV)/.installed-docs
	$(BIN)/mkdocs build

clean:
	rm -rf $(VENV) $(VENV)-newest runs build site *.egg-info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip

$(VENV)/.installed: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/pip install --quiet --editable '.[test]'
	touch $@

$(VENV)/.installed-parity: $(VENV)/.installed-test
	$(BIN)/pip install --quiet '$(TORCH)' 'transformers>=5' safetensors
	touch $@

$(VENV)/.installed-docs: $(VENV)/bin/python pyproject.toml
	$(BIN)/pip install --quiet --editable '.[docs]'
	touch $@
