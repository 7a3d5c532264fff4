# Two commands matter: `make demo` and `make test`. Both set up .venv first; what tests need beyond the demo comes with `make test`.
#
#   PYTHON=python3.12          which Python makes .venv
#   TORCH_INDEX=URL            a wheel index of PyTorch, to choose a CPU or CUDA build (see README)

PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: setup setup-dev demo test test-fast test-long lint bench docs wheel assets digits-var digits-mar scenes clean

setup: .venv/ready
setup-dev: .venv/ready-dev

# torch first, alone and pinned; the second install finds it satisfied and cannot replace it.
.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) torch
	$(PIP) --editable .
	touch $@

.venv/ready-dev: .venv/ready
	$(PIP) --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/dd2 demo

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

PYTEST := $(BIN)/pytest --numprocesses auto --maxprocesses 8 --dist loadscope

test: lint
	$(PYTEST)

# Without what runs from end to end: under a minute.
test-fast: setup-dev
	$(PYTEST) -m 'not e2e and not long'

# Trainings of minutes, at fixed seeds: what they must reach.
test-long: setup-dev
	$(PYTEST) -m long

# The documentation as a site, in site/; a link to nowhere is an error.
docs: setup-dev
	$(BIN)/mkdocs build --strict

# The wheel, built and used in an empty environment.
wheel:
	bash tools/check_wheel.sh $(PYTHON) "$$(grep '^torch' constraints.txt)"

bench: setup-dev
	$(BIN)/python benchmarks/proposition1.py
	$(BIN)/python benchmarks/training_step.py

# The embedded digits models, as they were made (about 15 minutes on two cores).
assets: setup
	$(BIN)/dd2 train-tokenizer configs/digits_tokenizer.yaml
	$(BIN)/dd2 train-teacher configs/digits_teacher.yaml
	$(BIN)/dd2 train-classifier --out runs/digits_classifier
	$(BIN)/python tools/embed_digits.py

# docs/results/digits_var.md: a VAR of the digits, from images to a one-step generator (about 30 minutes on two cores).
digits-var: setup
	$(BIN)/dd2 train-tokenizer configs/digits_var_tokenizer.yaml
	$(BIN)/dd2 train-teacher configs/digits_var_teacher.yaml
	$(BIN)/dd2 distill configs/digits_var.yaml
	$(BIN)/dd2 evaluate runs/digits_var --steps 1 2 3 4

# docs/results/digits_mar.md: a MAR of the digits, from images to a one-step generator (about an hour on two cores).
digits-mar: setup
	$(BIN)/dd2 train-tokenizer configs/digits_mar_tokenizer.yaml
	$(BIN)/dd2 train-teacher configs/digits_mar_teacher.yaml
	$(BIN)/dd2 distill configs/digits_mar.yaml
	$(BIN)/dd2 evaluate runs/digits_mar --steps 1 2 4 --teacher-steps 8 4 2 --batch 100

# docs/results/scenes.md: text to image, from pictures and captions to a one-step generator (an hour and a half of one core).
scenes: setup
	$(PIP) --editable '.[t2i]'
	$(BIN)/dd2 train-classifier configs/scenes_classifier.yaml
	$(BIN)/dd2 train-tokenizer configs/scenes_tokenizer.yaml
	$(BIN)/dd2 train-teacher configs/scenes_teacher.yaml
	$(BIN)/dd2 distill configs/scenes.yaml
	$(BIN)/dd2 evaluate runs/scenes --features runs/scenes_classifier/classifier --count 10101
	$(BIN)/dd2 evaluate runs/scenes --features runs/scenes_classifier/classifier --count 10057 --prompts scenes-unseen

clean:
	rm -rf .venv runs build dist site src/*.egg-info
