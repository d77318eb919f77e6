# Needs only make, a Python 3.11 or newer with venv, and pip's access to packages. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help venv venv-vllm test check demo bench clean prune

FIND_PYTHON = PYTHON='$(PYTHON)' scripts/find_python.sh
SUITES ?=
ARGS ?=

help: ## show this
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

venv: ## make .venv/dev: the package (editable) and the development tools
	@python=$$($(FIND_PYTHON)) && "$$python" scripts/environments.py dev

venv-vllm: ## make .venv/vllm: the same with vLLM for CPUs (about 4 GB, some minutes, once)
	@python=$$($(FIND_PYTHON)) && "$$python" scripts/environments.py vllm

test: ## run every test; SUITES="unit vllm" chooses, ARGS="-k name -x" goes to pytest
	@python=$$($(FIND_PYTHON)) && "$$python" scripts/run_suites.py test $(SUITES) -- $(ARGS)

check: ## lint, types, layering
	@python=$$($(FIND_PYTHON)) && "$$python" scripts/run_suites.py check $(SUITES)

demo: ## prefill and decode apart on two CPU engines, compared with a single engine; ARGS go to scripts/demo.py
	@python=$$($(FIND_PYTHON)) && PYTHON="$$python" scripts/demo.sh $(ARGS)

bench: ## run the benchmarks that need no engine (see benchmarks/README.md); ARGS=conductor chooses one
	@python=$$($(FIND_PYTHON)) && PYTHON="$$python" scripts/bench.sh $(ARGS)

clean: ## remove what is made inside this checkout, .venv included
	rm -rf .venv .demo build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

prune: ## remove cached environments that this checkout does not use
	@python=$$($(FIND_PYTHON)) && "$$python" scripts/environments.py --prune
