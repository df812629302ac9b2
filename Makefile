# Every target makes the virtual environment it needs; a second call finds it ready.
PYTHON ?= python3
VENV := .venv
RUN := JAX_PLATFORMS=cpu $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
TESTS := $(RUN) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# The tests of `make check` compile little, so that together they take about a minute.
FAST := tests/objective tests/lora tests/data tests/footage tests/test_config.py tests/test_config_mistakes.py \
	tests/test_inputs.py tests/test_files.py

.PHONY: setup setup-test demo check test test-all lint benchmark clean

setup: $(VENV)/.setup

$(VENV)/.setup: requirements.txt pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint requirements.txt --editable .
	touch $@

$(VENV)/.setup-test: $(VENV)/.setup
	$(PIP) install --quiet --constraint requirements.txt --editable '.[test]'
	$(PIP) install --quiet --constraint requirements.txt --no-deps diffsynth
	touch $@

demo: $(VENV)/.setup
	$(RUN) scripts/demo.py

setup-test: $(VENV)/.setup-test

check: $(VENV)/.setup-test lint
	$(TESTS) -m 'not slow' $(FAST)

test: $(VENV)/.setup-test lint
	$(TESTS) -m 'not slow'

test-all: $(VENV)/.setup-test lint
	JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(TESTS)

lint: $(VENV)/.setup-test
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright
	$(VENV)/bin/lint-imports

# Give it a quiet machine. It writes cpu.json and cpu.md.
benchmark: $(VENV)/.setup-benchmark
	$(RUN) scripts/benchmark.py --output=docs/performance

$(VENV)/.setup-benchmark: $(VENV)/.setup
	$(PIP) install --quiet --constraint requirements.txt --editable '.[benchmark]'
	touch $@

clean:
	rm -rf $(VENV) runs/demo
