# `make train` runs the main job, `make infinity` one with all states on a disk, `make test` the tests, `make test-integrations` those with the libraries that train with
# this package, `make check` the static checks; each sets up .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: train infinity test test-integrations check clean

$(VENV)/ready: pyproject.toml constraints.txt
	@echo "setting up $(VENV) with torch and the package: a few minutes, once"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@

$(VENV)/integrations: $(VENV)/ready
	$(BIN)/pip install --quiet --constraint constraints.txt 'deepspeed[integrations]'  # the package itself is there
	touch $@

train: $(VENV)/ready
	$(BIN)/deepspeed --num_gpus 2 examples/train_lm/train.py --deepspeed_config examples/train_lm/ds_config.json

infinity: $(VENV)/ready
	$(BIN)/deepspeed --num_gpus 1 --grace_period 3600 examples/infinity/train.py

test: $(VENV)/ready
	$(BIN)/python -m pytest --ignore tests/integrations

test-integrations: $(VENV)/integrations
	$(BIN)/python -m pytest tests/integrations

check: $(VENV)/ready
	$(BIN)/ruff check src tests examples benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

clean:
	rm -rf $(VENV)
