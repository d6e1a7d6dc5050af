# make test        set up .venv and run the linters and the fast tests (what CI runs)
# make test-all    the slow tests too
# make test-slurm  trainings under a real SLURM on this machine (root, Debian)
# make quickstart  from nothing to volumes in one command, with simulated data
# make bench-speed every ratio of speed and memory in one run
# make bench       the tables of speed and quality (needs cryoDRGN and RELION for the peers' columns)
# make bench-fire  the table of loads, faults and bad inputs
# make proof       every method side by side on the same sets: make proof PROOF="--suite quick"
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: test test-all test-slurm lint quickstart bench bench-speed bench-fire proof clean

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
	$(BIN)/python -m pytest -n 2 -m "not slurm"

# trainings under a real SLURM of one node, pre-empted and resumed; installs Debian's packages if need be (as root)
test-slurm: $(VENV)/installed
	command -v /usr/sbin/slurmctld >/dev/null || (apt-get update && apt-get install -y slurm-wlm munge)
	$(BIN)/python -m pytest -m slurm -rs tests/test_slurm.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache

quickstart: $(VENV)/installed
	PATH="$(CURDIR)/$(BIN):$$PATH" bash tutorials/quickstart.sh quickstart

$(VENV)-cryodrgn/installed:
	$(PYTHON) -m venv $(VENV)-cryodrgn
	$(VENV)-cryodrgn/bin/python -m pip install --quiet --upgrade pip
	$(VENV)-cryodrgn/bin/python -m pip install --quiet cryodrgn
	touch $@

# many hours on two cores; of the trainings what is finished is not repeated. BENCH_SHARED holds data/atomic/{bench,train} with the
# PDB entries (tests/benchmarks/sets.py), BENCH_WORK keeps sets and runs
BENCH_SHARED ?= ../shared
BENCH_WORK ?= bench
BENCH := CRYOSUITE_SHARED="$(abspath $(BENCH_SHARED))" CRYODRGN_VENV="$(CURDIR)/$(VENV)-cryodrgn" $(BIN)/python tests/benchmarks
bench: bench-speed
	$(BENCH)/hype_vs_vae.py
	$(BENCH)/mixture.py --structures $(BENCH_SHARED)/data/atomic/bench
	$(BENCH)/kraqen.py --work $(BENCH_WORK)
	$(BENCH)/polish.py --work $(BENCH_WORK) --family polish rough d128
	$(BENCH)/polish.py --work $(BENCH_WORK) --family polish --rows true,kraqen
	$(BENCH)/polish.py --work $(BENCH_WORK) --family rough --rows true,kraqen
	$(BENCH)/kraqen_limits.py --work $(BENCH_WORK)
	$(BENCH)/polish_modes.py --work $(BENCH_WORK) --errors 0 0.3
	$(BENCH)/classes_memory.py --work $(BENCH_WORK)/classes
	$(BENCH)/polish.py --work $(BENCH_WORK) --family methods --seeds 0 --rows true,kraqen,hype,cryodrgn
	$(BENCH)/ablation.py --work $(BENCH_WORK)
	$(BENCH)/sets.py --work $(BENCH_WORK) --only methods
	$(BENCH)/deco.py --work $(BENCH_WORK)/deco --family known --set $(BENCH_WORK)/sim/mix16-d32-snr0.1-n8000-s{seed} --seeds 0,1,2
	$(BENCH)/deco.py --work $(BENCH_WORK)/deco --family known --set $(BENCH_WORK)/sim/ribo16-d64-snr0.1-n2400-s{seed} --seeds 0,1,2
	$(BENCH)/sets.py --work $(BENCH_WORK) --only abinitio
	$(BENCH)/deco.py --work $(BENCH_WORK)/deco --family abinitio --set $(BENCH_WORK)/sim/mix4-d32-snr0.1-n4000-s{seed} --seeds 0,1,2
	$(BENCH)/fastar.py --work $(BENCH_WORK)/fastar --box 64
	$(BENCH)/fastar_abinitio.py --work $(BENCH_WORK)/fastar-abinitio
	$(BENCH)/lvm.py sharpen superres wedge safety --keep $(BENCH_WORK)/lvm
	$(BIN)/python tests/benchmarks/tables.py

# every figure of speed and memory in one run, some forty minutes on two cores that do nothing else
bench-speed: $(VENV)/installed $(VENV)-cryodrgn/installed
	$(BENCH)/bench_speed.py --work $(BENCH_WORK)/speed

# loads, faults, bad inputs: a script a line, each writes its results/fire_*.json and can be run alone
bench-fire: $(VENV)/installed
	$(BENCH)/fire_kill.py --work $(BENCH_WORK)/fire/kill
	$(BENCH)/fire_disk.py --work $(BENCH_WORK)/fire/disk
	$(BENCH)/fire_stack.py --work $(BENCH_WORK)/fire/stack
	$(BENCH)/fire_million.py --work $(BENCH_WORK)/fire/million
	$(BENCH)/fire_loader.py --work $(BENCH_WORK)/fire/loader
	$(BENCH)/fire_fuzz.py --work $(BENCH_WORK)/fire/fuzz
	$(BENCH)/fire_numerics.py --work $(BENCH_WORK)/fire/numerics
	$(BENCH)/fire_distributed.py --work $(BENCH_WORK)/fire/distributed
	$(BIN)/python tests/benchmarks/tables.py

# without options some twenty hours on two cores: give e.g. PROOF="--sets mix16 --snr 0.1 --seeds 0 --budget-minutes 60";
# what is finished is not repeated, so the next call goes on
PROOF ?=
proof: $(VENV)/installed $(VENV)-cryodrgn/installed
	$(BENCH)/proof.py --work $(BENCH_WORK) $(PROOF)
	$(BIN)/python tests/benchmarks/tables.py
