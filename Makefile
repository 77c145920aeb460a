# Every target sets up what it needs: the first one that runs makes .venv from requirements.lock, with hashes.

PYTHON ?= python3
VENV := .venv
BIN := $(abspath $(VENV))/bin
READY := $(VENV)/.ready
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := true

# Test processes, each of one thread.
JOBS ?= 2

.DEFAULT_GOAL := help
.PHONY: help repro exp-show tune ui recover test test-all lint lock

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

$(READY): requirements.lock
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d; allowed: make PYTHON=python3.x ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@if [ -e .git ] && ! git config user.email > /dev/null; then \
	  git config --local user.name 'kfac benchmark' && git config --local user.email benchmark@localhost && \
	  echo 'Git has no identity, and dvc exp run stores experiments as commits: this repository now uses benchmark@localhost'; \
	fi
	@touch $@

repro: $(READY)  ## run the benchmark (dvc repro) and print the comparison
	dvc repro
	@python -m pipeline.aggregate --show
	@echo 'Next: report/index.html is the report as a page; `make ui` opens the runs in MLflow; `make exp-show` lists experiments;'
	@echo '      dvc exp run -S optimizer=ekfac trains E-KFAC alone (source .venv/bin/activate first).'

exp-show: $(READY)  ## list experiments with what they changed and their steps to target
	dvc exp show --only-changed --drop 'Created|State|Executor|^data/|^kfac|^pipeline|^results'

tune: $(READY)  ## the same number of trials for every optimizer; options in ARGS, as in make tune ARGS=--dry-run
	@python -m pipeline.tune $(ARGS)

ui: $(READY)  ## serve the MLflow UI of this repository on loopback
	python -m pipeline.tracking ui

recover: $(READY)  ## after dvc was killed: back to the branch, stale locks away, lost points queued again
	@python -m pipeline.recover

test: lint  ## lint, then run the tests
	OMP_NUM_THREADS=1 python -m pytest -n $(JOBS)

test-all: lint  ## the same with the slow tests
	OMP_NUM_THREADS=1 python -m pytest -n $(JOBS) -m ''

lint: $(READY)  ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy

lock: $(READY)  ## compile requirements.lock from pyproject.toml
	python -m uv pip compile --quiet --universal --generate-hashes --no-header --python-version 3.11 --all-extras \
	  --output-file requirements.lock pyproject.toml
