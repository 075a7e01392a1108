# make train   the demo: environment, phantoms, training      (then: make audit)
# make audit   audit the newest run in results/
# make test    environment, linter, tests
PYTHON ?= python3
BIN = .venv/bin

.PHONY: train audit test clean

train: .venv/run-ready
	$(BIN)/python train_drunet_v2.py

audit: .venv/run-ready
	$(BIN)/python final_evaluation_v2.py

test: .venv/test-ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest

clean:
	rm -rf .venv cache

.venv/run-ready: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements.txt
	touch $@

.venv/test-ready: .venv/run-ready requirements-dev.txt
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt
	touch $@
