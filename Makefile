# `make demo` and `make test` are all that a fresh machine needs: both install into .venv first.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: help venv install tools demo screenshot test check format clean

help:  ## say what can be made
	@awk -F ':.*  ## ' '/^[a-z]+:.*  ## / { printf "make %-12s%s\n", $$1, $$2 }' Makefile

venv: $(VENV)/pip-works  ## an empty .venv, for what is to be there before the rest: torch without CUDA

install: $(VENV)/installed  ## the command moe-edge, with all that it can do, into .venv

tools: $(VENV)/tools-installed  ## what checks, tests and documentation need, too

$(VENV)/pip-works:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is not Python 3.11 or newer"; \
	    echo "hint: name one that is, as in: make PYTHON=python3.12"; exit 1; } >&2
	@$(PYTHON) -m venv --clear $(VENV) || \
	  { echo "error: $(PYTHON) cannot make a virtual environment"; \
	    echo "hint: on Debian and Ubuntu: apt install python3-venv"; exit 1; } >&2
	@touch $@

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/pip-works
	@echo "installing moe-edge, torch and TensorRT-RTX into $(VENV): some minutes, 2 GB"
	@$(PIP) --editable ".[all]" || \
	  { echo "hint: pip says above what it misses. Is there a network? Then run the same command again"; exit 1; } >&2
	@touch $@

$(VENV)/tools-installed: $(VENV)/installed
	@$(PIP) --editable ".[all,docs,test]"
	@touch $@

demo: install  ## the whole way with the embedded model, into demo-output/report.html
	rm -rf demo-output
	$(BIN)/moe-edge demo -o demo-output

screenshot: demo tools  ## docs/report.png, as Chromium shows the demo's report
	$(BIN)/python -m tests.report.screenshot demo-output/report.html docs/report.png

check: tools  ## what a reviewer would ask for, in a minute
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet  # into build/site

test: check  ## everything: checks, doctests, unit tests, end-to-end tests
	$(BIN)/python -m pytest -n $(WORKERS)

format: tools  ## what ruff can mend by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove all that was made
	rm -rf $(VENV) demo-output build *.egg-info
