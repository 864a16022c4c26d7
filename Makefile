# Two commands do everything on a fresh machine with Python and make:
#   make train    a hybrid Mamba-2 model on real text, two processes sharing every sequence
#   make test     all tests, WORKERS files at a time
# Each makes its own virtual environment in $(VENV). `VENV=` (empty) uses the Python at hand with what it has.

VENV ?= .venv
TORCH ?= torch==2.13.0
CONFIG ?= examples/hybrid.yaml
ARGS ?=
WORKERS ?= 2

ifeq ($(strip $(VENV)),)
PYTHON ?= python3
else
PYTHON := $(VENV)/bin/python
TRAIN_READY := $(VENV)/ready-train
TEST_READY := $(VENV)/ready-test
endif

.PHONY: train test

train: $(TRAIN_READY)
	$(PYTHON) -m mamba2_dist train $(CONFIG) $(ARGS)

test: $(TEST_READY)
	$(PYTHON) -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

$(VENV)/ready-%: setup.py pyproject.toml
	@echo "installing into $(VENV)"
	test -x $(PYTHON) || python3 -m venv $(VENV)
	$(PYTHON) -m pip install -q --disable-pip-version-check $(TORCH)
	$(PYTHON) -m pip install -q --disable-pip-version-check -e '.[$*]'
	touch $@
