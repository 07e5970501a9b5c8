# Two commands on a fresh machine with Python 3.11 or newer: `make demo` and `make test`. Both install first.
PYTHON ?= python3
VENV := .venv
WORKERS ?= 2
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: install demo screenshot test check format clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[all,docs,test]"
	touch $(STAMP)

demo: install  ## calibrate, plan, export, optimise, build, verify, bench and report the embedded model
	rm -rf demo-output
	$(BIN)/moe-edge demo -o demo-output

screenshot: demo  ## docs/report.png, as Chromium shows the demo's report
	$(BIN)/python -m tests.report.screenshot demo-output/report.html docs/report.png

check: install  ## what a reviewer would ask for, in seconds
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet  # into build/site

test: check  ## everything: checks, doctests, unit tests, end-to-end tests
	$(BIN)/python -m pytest -n $(WORKERS)

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo-output build *.egg-info
