# make demo: install into .venv and fine-tune a small model on two Ray workers with ZeRO-3
# make demo_dpo: the same, then preferences: DPO on what the first demo made
# make test: install and run the tests      make lint: ruff and mypy
# make test PYTEST_ARGS='tests/data -x': a part of them, in one process
# Nothing is installed again until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PYTEST_ARGS ?= -n 3
INSTALLED := $(VENV)/.installed

.PHONY: demo demo_dpo test lint install clean

demo: $(INSTALLED)
	$(BIN)/posttrain train +experiment=demo

demo_dpo: demo
	$(BIN)/posttrain train +experiment=demo_dpo

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

install: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed: make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .mypy_cache .ruff_cache
