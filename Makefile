# Two targets are all the set-up: `make serve` and `make test`. Everything lands in .venv.
PYTHON ?= python3
TORCH ?= auto
VENV := .venv
BIN := $(VENV)/bin

.PHONY: install serve test lint format types protos verify-models verify-serving verify-training clean

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt scripts/install.sh
	PYTHON=$(PYTHON) TORCH=$(TORCH) VENV=$(VENV) sh scripts/install.sh
	@touch $@

serve: install ## the embedded model on 127.0.0.1:8001; Ctrl-C stops it and leaves nothing behind
	@exec $(BIN)/ladderstitch serve

test: install lint types ## everything that CI runs, from nothing
	$(BIN)/buf lint
	$(BIN)/python scripts/protos.py --check
	$(BIN)/pytest

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

format: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

types: install
	$(BIN)/mypy

protos: install ## regenerate the committed stubs
	$(BIN)/python scripts/protos.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
