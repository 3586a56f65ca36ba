# The quick start: `make run` and `make test` set everything up on a fresh machine with Python 3.11 or newer.

PYTHON ?= python3
BIN := .venv/bin

.PHONY: run test test-slow lint check clean

# Only here do synthetic images replace a missing dataset, and the output says so; the scripts never do that.
run: .venv/ready
	@data=; batch=; $(BIN)/python utils.py || { [ $$? -eq 2 ] || exit 1; data=--synthetic; batch="--batch-size 500"; \
	    echo "CIFAR-100 is not available here, so this run uses SYNTHETIC images. It shows that everything works, but"; \
	    echo "its numbers say nothing about CIFAR-100. data/README.md describes where to put the dataset."; }; \
	$(BIN)/python train_mlp.py --overfit-batch $$data && \
	$(BIN)/python train_mlp.py --epochs 5 --name quickstart-$$(date +%Y%m%d-%H%M%S) $$data $$batch && \
	echo "(first, in this shell: . .venv/bin/activate)"

test: .venv/ready
	$(BIN)/python -m pytest

test-slow: .venv/ready
	$(BIN)/python -m pytest -m slow

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/mypy

check: .venv/ready
	$(BIN)/python evaluate.py --check

.venv/ready: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: this needs Python 3.11 or newer; choose one with make PYTHON=python3.11 ...")'
	@echo "installing the requirements into .venv (a few minutes, up to 6 GB with the GPU libraries)"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

clean:
	rm -rf .venv
