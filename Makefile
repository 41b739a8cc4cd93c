# make demo   show myplugin on a private Docker Engine, step by step (ENGINE=20.10|26.1|28.5|host, or none: without Docker)
# make demo-swarm  show netplugin-overlay on a swarm of three hosts with an engine each, step by step (a minute)
# make test   run every check and every test, real engines included (15 minutes; needs root)
# make test-quick  test each module alone: no root, no network (a minute)
# make test-pythons  run test-quick with each installed Python from 3.11 to 3.14 (8 minutes the first time)
# make test-kernel  test in network namespaces that the tests make (2 minutes; needs root)
# make test-engine  test with real engines (11 minutes; needs root)
# make test-all  before a release, run every test on every engine, with the full number of cases (an hour)
# make coverage  show which lines and branches of the SDK the quick and the kernel tests reach (8 minutes; needs root)
# make docs   build the documentation in build/docs, and check its links, names and code (20 seconds)
# make audit  check the installed packages against PyPI's list of vulnerabilities (10 seconds)
# make mutants  break the SDK one line at a time, and list the changes that no unit test notices (an hour; MUTANTS="--minutes 10")
# make bench  measure a call, a start and an idle plugin, side by side with rivals (2 minutes)
# make bench-engine  compare myplugin with Docker's bridge on a private engine (15 minutes; needs a quiet machine)
# make release  build wheel and sdist of the last commit twice, and compare them (a minute)
# make bench-overlay  compare netplugin-overlay with Docker's overlay, in a swarm of three engines (4 minutes)
# make bench-scale  measure the overlay in a swarm of 1 000 nodes: a model, and one real node (6 minutes)
# make parity  compare myplugin with bridge, row by row, on every engine, and write docs/parity.md (15 minutes)
ENGINE ?= 26.1
VENV ?= .venv
#: Tests start hundreds of plugins, so keep the compiled modules.
unexport PYTHONDONTWRITEBYTECODE
BIN := $(VENV)/bin
SETUP_INPUT := tools/setup pyproject.toml $(wildcard examples/*/pyproject.toml)

.PHONY: demo demo-swarm test test-all test-quick test-pythons test-kernel test-engine coverage lint audit mutants bench bench-engine bench-overlay bench-scale docs parity release clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' $(MAKEFILE_LIST)

demo: $(VENV)/.run
	@$(BIN)/python examples/demo.py --engine $(ENGINE)

demo-swarm: $(VENV)/.run
	@$(BIN)/python examples/demo_swarm.py --engine $(ENGINE)

#: -n: more workers than processors, since tests also wait.
PYTEST := $(BIN)/python -m pytest --durations=10

test: lint test-quick test-kernel test-engine

test-all: export NETPLUGIN_FULL := 1
test-all: test

test-quick: $(VENV)/.dev
	$(PYTEST) -n 3 --dist loadscope tests/unit tests/wire $(PYTEST_ARGS)

test-pythons:
	@tools/test-pythons

test-kernel: $(VENV)/.dev
	$(PYTEST) -n 4 tests/kernel $(PYTEST_ARGS)

test-engine: $(VENV)/.dev
	$(PYTEST) -n 4 --dist loadscope --no-loadscope-reorder tests/engine $(PYTEST_ARGS)

coverage: $(VENV)/.dev
	@mkdir -p build
	$(PYTEST) -m "not untraced" -n 3 --dist loadscope --cov --cov-report= tests/unit tests/wire $(PYTEST_ARGS)
	$(PYTEST) -m "not untraced" -n 4 --cov --cov-append --cov-report= tests/kernel $(PYTEST_ARGS)
	$(BIN)/coverage html --quiet
	$(BIN)/coverage report
	@echo "line by line: build/coverage-html/index.html"

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

audit: $(VENV)/.dev
	@tools/audit

mutants: $(VENV)/.dev
	@[ -d .mutants ] || $(BIN)/python -m pip install --quiet --target .mutants cosmic-ray==8.7.0 coverage==7.11.0
	@PYTHONPATH=.mutants nice $(BIN)/python tools/mutants $(MUTANTS)

docs: $(VENV)/.dev
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -b html -d build/doctrees docs build/docs
	$(BIN)/python -m pytest --quiet tests/unit/test_docs.py $(PYTEST_ARGS)
	@echo "build/docs/index.html"

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/cnm.py
	$(BIN)/python benchmarks/tracing.py

bench-engine: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/engine.py --engine $(ENGINE) --json build/engine-$(ENGINE).json --svg docs/engine-benchmark.svg

bench-overlay: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/overlay.py --engine $(ENGINE) --json build/overlay-$(ENGINE).json

bench-scale: $(VENV)/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/scale.py --json build/scale.json --svg docs/pictures/scaling.svg

parity: $(VENV)/.dev
	$(BIN)/python -m pytest tests/engine/parity --parity-table

release: $(VENV)/.dev
	@tools/release

clean:
	rm -rf $(VENV) .audit .mutants build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

$(VENV)/.run: $(SETUP_INPUT)
	tools/setup run

$(VENV)/.dev: $(SETUP_INPUT)
	tools/setup dev
