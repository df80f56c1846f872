# Every target makes what it needs; `make test` on a clean clone needs nothing else.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: setup lint test

setup: ## make .venv with everything that CPU needs
	@PYTHON="$(PYTHON)" bash tools/setup.sh

lint: setup ## style, types, and imports that point down only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint ## everything that CI runs
	$(BIN)/python -m pytest
