# Nexus: two commands matter, `make demo` and `make test`; `make` alone lists the rest.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DOCS ?= deployments/manuals
QUESTION ?= How do I clear an E-217 that stays latched?
export NEXUS_HOME ?= $(CURDIR)/.demo

.DEFAULT_GOAL := help
.PHONY: help install install-vllm install-test browser demo down test check format lint types fast

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# Pins hold names and versions only and are complete, so nothing is resolved and nothing else comes in.
$(VENV)/.installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Nexus needs Python 3.11 or later; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/.installed-vllm: $(VENV)/.installed requirements-vllm.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-vllm.lock
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed $(VENV)/.installed-vllm requirements-test.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-test.lock
	touch $@

install: $(VENV)/.installed ## make .venv with the pinned dependencies
install-vllm: $(VENV)/.installed-vllm ## add vLLM's engine for machines without a GPU
install-test: $(VENV)/.installed-test

# Without it the tests that look at Athena in a browser are skipped, and say so.
browser:
	@command -v chromium >/dev/null \
		|| { test "$$(id -u)" = 0 && command -v apt-get >/dev/null \
			&& { apt-get install -y -qq chromium || { apt-get update -qq && apt-get install -y -qq chromium; }; } >/dev/null; } \
		|| echo "There is no Chromium: the browser tests are skipped. Install it with: apt-get install chromium"

demo: install ## start Nexus, add DOCS=…, ask QUESTION=…, leave it running
	$(BIN)/nexus up
	$(BIN)/nexus add "$(DOCS)" || echo "some files were left out; see above"
	@echo; echo "Q: $(value QUESTION)"; echo
	@$(BIN)/nexus ask -- "$$QUESTION"
	@echo; echo "Nexus goes on running. Ask more:  NEXUS_HOME=$(NEXUS_HOME) $(BIN)/nexus ask \"…\""
	@echo "Stop it with:  make down"
export QUESTION

down: ## stop what `make demo` started
	@test ! -x $(BIN)/nexus || $(BIN)/nexus down

# Python keeps what it compiles: hundreds of processes start in these tests.
test: install-test browser ## run the whole suite in two processes
	env -u NEXUS_HOME -u PYTHONDONTWRITEBYTECODE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: install-test format lint types fast ## format, lint, types, fast tests

format:
	$(BIN)/ruff format --check .
lint:
	$(BIN)/ruff check .
types:
	$(BIN)/mypy
fast:
	env -u NEXUS_HOME $(BIN)/python -m pytest -m "not system and not faults"
