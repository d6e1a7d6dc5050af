# make test        set up .venv and run the linters and the fast tests (what CI runs)
# make test-all    the slow tests too
# make quickstart  from nothing to volumes in one command, with simulated data
# make bench       the tables of speed and quality (needs cryoDRGN and RELION for the peers' columns)
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test test-all lint quickstart bench clean

$(VENV)/installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

test: lint
	$(BIN)/python -m pytest -n 2

test-all: lint
	$(BIN)/python -m pytest -n 2 -m "slow or not slow"

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

quickstart: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tutorials/quickstart.sh quickstart

$(VENV)-cryodrgn/installed:
	$(PYTHON) -m venv $(VENV)-cryodrgn
	$(VENV)-cryodrgn/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-cryodrgn/bin/python -m pip install --quiet cryodrgn
	touch $@

# about an hour on two cores; BENCH_STRUCTURES is a folder with the PDB entries of mini-mix16 (tests/benchmarks/mixture.py)
BENCH_STRUCTURES ?= ../shared/data/atomic/bench
bench: $(VENV)/installed $(VENV)-cryodrgn/installed
	CRYODRGN_VENV="$(CURDIR)/$(VENV)-cryodrgn" $(BIN)/python tests/benchmarks/speed.py
	CRYODRGN_VENV="$(CURDIR)/$(VENV)-cryodrgn" $(BIN)/python tests/benchmarks/hype_vs_vae.py
	$(BIN)/python tests/benchmarks/mixture.py --structures $(BENCH_STRUCTURES)
	$(BIN)/python tests/benchmarks/tables.py
