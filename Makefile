# Bare `make` prints the targets. Each environment is made once and again when pyproject.toml or the pins change.
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv-dev
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# A file's tests stay together: they share servers and compiled models.
# In the files' own order, since the last ones are short: nobody waits long for the other worker.
AT_ONCE := --numprocesses 2 --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help demo neptune test test-all check format clean

help: ## Print the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(DEMO)/installed ## Compile a real model for two targets, prove it and register it; needs no account
	@COMPILEFLOW_HOME=.demo $(DEMO)/bin/python -m flows demo

neptune: $(DEV)/installed ## Start the Neptune-compatible registry server on port 8765; its data is in .neptune
	@$(DEV)/bin/python -m deployments.neptune_server --root .neptune --project compileflow/models

test: $(DEV)/installed ## Run the tests
	@$(DEV)/bin/python -m pytest $(AT_ONCE) -m "not slow"

test-all: $(DEV)/installed ## Run the tests, the slow ones too
	@$(DEV)/bin/python -m pytest $(AT_ONCE)

check: $(DEV)/installed ## Lint, format, types, one-way imports
	@$(DEV)/bin/ruff check .
	@$(DEV)/bin/ruff format --check .
	@$(DEV)/bin/mypy
	@$(DEV)/bin/lint-imports

format: $(DEV)/installed ## Put the code into its format
	@$(DEV)/bin/ruff format .
	@$(DEV)/bin/ruff check --fix .

clean: ## Delete environments, the demo's results and caches
	@rm -rf $(DEMO) $(DEV) .demo .pytest_cache .mypy_cache .ruff_cache .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO)/installed: pyproject.toml constraints.txt
	@echo "installing into $(DEMO); a few minutes, once"
	@$(PYTHON) -m venv --clear $(DEMO)
	@$(DEMO)/bin/python $(PIP) --editable '.[demo]'
	@touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(DEV); a few minutes, once"
	@$(PYTHON) -m venv --clear $(DEV)
	@$(DEV)/bin/python $(PIP) --editable '.[dev]'
	@touch $@
