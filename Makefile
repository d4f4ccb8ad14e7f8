# make quickstart   align a small Stable Diffusion on real pairs, with a report
# make test         run the tests
# Both make .venv first if it is missing. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# Python 3.13 and later share the lock of 3.12.
LOCK := $(shell $(PYTHON) -c "import sys; \
  print('requirements/lock-py31%d.txt' % min(2, sys.version_info[1] - 10))")
RUNS ?= runs

.PHONY: quickstart test slow-test lint clean

quickstart: $(VENV)/.runtime
	$(BIN)/python -m dpo_jax.main --config=configs/quickstart.py \
	  --workdir=$(RUNS)/quickstart

test: $(VENV)/.test
	$(BIN)/python -m pytest -n auto --maxprocesses=4 --dist=worksteal

slow-test: $(VENV)/.test
	$(BIN)/python -m pytest -m slow

lint: $(VENV)/.test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c "import sys; v = sys.version_info[:2]; \
	  sys.exit(0 if v >= (3, 11) else 'Python 3.11 or newer is needed; \
	  set PYTHON=python3.11, say')"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(BIN)/python requirements/runtime.txt $(LOCK) setup.py
	$(PIP) -r requirements/runtime.txt -c $(LOCK)
	$(PIP) --no-deps --editable .
	touch $@

$(VENV)/.test: $(VENV)/.runtime requirements/test.txt
	$(PIP) -r requirements/test.txt -c $(LOCK)
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info $${DPO_JAX_TEST_CACHE:-~/.cache/dpo_jax_tests}
