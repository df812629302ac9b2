# Every target makes the virtual environment it needs; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.PHONY: setup demo test test-all lint clean

setup: $(VENV)/.setup

$(VENV)/.setup: requirements.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements.txt --editable .
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup
	$(PIP) install --quiet --constraint requirements.txt --editable '.[test]'
	touch $@

demo: $(VENV)/.setup
	$(RUN) scripts/demo.py

test: $(VENV)/.setup-test lint
	$(RUN) -m pytest -n 2 --dist loadfile -m 'not slow'

test-all: $(VENV)/.setup-test lint
	$(RUN) -m pytest -n 2 --dist loadfile

lint: $(VENV)/.setup-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

clean:
	rm -rf $(VENV) runs/demo
