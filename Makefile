# Two commands, nothing to set up first:
#   make demo   train, prune and export on the digits data; prints the before/after table
#   make test   format, lint, types, tests
#   make docs   the documentation site, in site/, with every snippet of its pages run
#   make wheel  wheel and sdist, in dist/, each tried in an environment of its own
#   make versions  the tests with the oldest and newest TensorFlow and Keras, each in a fresh one
# And `make coverage` for the tests with the share of lines that they reach.
# All create .venv with a suitable Python and install into it; PYTHON=... picks the interpreter.

VENV := .venv
BIN := $(VENV)/bin
JOBS ?= 2
PYTHON ?=

.PHONY: demo test coverage docs wheel versions clean
.DELETE_ON_ERROR:

demo: $(VENV)/.installed-demo
	$(BIN)/python examples/digits_quickstart.py --output_dir=runs/digits --overwrite

test: $(VENV)/.installed-test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy tf_kfacprune
	$(BIN)/python -m pytest -n $(JOBS)

# Apart from `test`, because counting lines takes time.
coverage: $(VENV)/.installed-test
	$(BIN)/python -m pytest -n $(JOBS) --cov --cov-report=term

# Snippets that train for real are marked slow, and run here.
docs: $(VENV)/.installed-docs
	$(BIN)/python docs/generate.py --check
	$(BIN)/python -m pytest tests/docs -m "slow or not slow"
	$(BIN)/python -m mkdocs build --strict

wheel: $(BIN)/python
	$(BIN)/python tests/packaging/smoke.py

versions: $(BIN)/python
	$(BIN)/python tests/packaging/versions.py

# The stamps keep the installation from being repeated until the requirements change.
$(VENV)/.installed-demo: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	@touch $@

$(VENV)/.installed-test: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

$(VENV)/.installed-docs: $(BIN)/python setup.cfg pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs,test]'
	@touch $@

$(BIN)/python:
	@for python in $(PYTHON) python3.11 python3.12 python3.13 python3 python; do \
	  if "$$python" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' \
	      >/dev/null 2>&1; then \
	    echo "Creating $(VENV) with $$python ($$($$python --version))"; \
	    exec "$$python" -m venv --clear $(VENV); \
	  fi; \
	done; \
	echo "No Python from 3.11 to 3.13 with the 'venv' module was found." >&2; \
	echo "Install one (on Debian or Ubuntu: apt-get install python3.11 python3.11-venv)" >&2; \
	echo "or name it: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; \
	exit 1

clean:
	rm -rf $(VENV) runs build dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage *.egg-info
