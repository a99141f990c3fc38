# make quickstart   set up and distil a real teacher with two local processes, in minutes on two cores
# make test         set up and run the tests
# make test-slow    set up and run the others: whole runs, every kernel compiled
# make faults       set up and measure what is promised of interrupted runs; QUICK=1 for some of each
# make setup        only set up: .venv with everything in it; quick when nothing has changed

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --retries 10 --timeout 60 --constraint constraints.txt
READY := .venv/ready
# Two processes; each takes whole files, whose tests share what is costly to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

.PHONY: quickstart test test-slow faults lint setup

quickstart: setup
	$(BIN)/mlkd distill configs/quickstart.yaml

test: setup
	$(PYTEST) -m "not slow"

test-slow: setup
	$(PYTEST) -m slow

# OUT=FILE for the results, ONLY=GROUP,GROUP for some groups; see tests/faults/__main__.py.
faults: setup
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m faults

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

setup: $(READY)

# torch first: building deepspeed looks for it, and the pin keeps pip from choosing another build.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing into .venv; the first time takes some minutes."
	$(PIP) torch
	$(PIP) --editable ".[dev]"
	@touch $(READY)
