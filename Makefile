# make demo   a private Docker Engine uses myplugin, step by step (ENGINE=20.10|26.1|28.5|host, or none: without Docker)
# make demo-swarm  three hosts with an engine each: a swarm, and a network of netplugin-overlay on it, step by step (a minute)
# make test   every check and every test, real engines included
# make docs   build the documentation to build/docs, and hold it against itself: links, names, code (20 seconds)
# make audit  hold the installed packages against the vulnerabilities that PyPI knows of (10 seconds)
# make bench  what a call, a start and a plugin at rest cost, side by side with others (2 minutes)
# make bench-engine  myplugin and Docker's bridge side by side on a private engine (15 minutes; wants a quiet machine)
# make release  build wheel and sdist of the last commit twice, and compare them (a minute)
# make bench-overlay  netplugin-overlay and Docker's overlay side by side, in a swarm of three engines (4 minutes)
# make bench-scale  the overlay in a swarm of 1 000 nodes: a model, and one node of it for real (6 minutes)
# make parity  hold myplugin against bridge, row by row, on every engine, and write docs/parity.md (15 minutes)
ENGINE ?= 26.1
BIN := .venv/bin
SETUP_INPUT := tools/setup pyproject.toml $(wildcard examples/*/pyproject.toml)

.PHONY: demo demo-swarm test test-once test-unit test-kernel lint audit bench bench-engine bench-overlay bench-scale docs parity release clean
.DEFAULT_GOAL := help

help:
	@sed -n 's/^# //p' $(MAKEFILE_LIST)

demo: .venv/.run
	@$(BIN)/python examples/demo.py --engine $(ENGINE)

demo-swarm: .venv/.run
	@$(BIN)/python examples/demo_swarm.py --engine $(ENGINE)

#: Engines side by side: their tests wait more than they work. Not what looks whether this machine is as it was.
ENGINES := 20.10 26.1 28.5
ALONE := tests/engine/test_demo.py
test: lint
	@echo "unit, wire and kernel, side by side: about 10 minutes; what they say comes at the end of each"
	@$(MAKE) --no-print-directory --jobs=2 --output-sync test-unit test-kernel
	$(BIN)/python -m pytest $(ALONE) $(PYTEST_ARGS)
	@echo "engines $(ENGINES), side by side: about half an hour; what they say comes at the end of each"
	@$(MAKE) --no-print-directory --jobs=3 --output-sync test-once $(ENGINES:%=test-engine-%)

test-unit: .venv/.dev
	$(BIN)/python -m pytest tests/unit tests/wire $(PYTEST_ARGS)

test-kernel: .venv/.dev
	$(BIN)/python -m pytest tests/kernel $(PYTEST_ARGS)

test-engine-%: .venv/.dev
	$(BIN)/python -m pytest tests/engine --ignore $(ALONE) -m "not one_engine" --engine $* $(PYTEST_ARGS)

#: What has little to do with the engine's version.
test-once: .venv/.dev
	$(BIN)/python -m pytest tests/engine -m one_engine --engine 26.1 $(PYTEST_ARGS)

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy

audit: .venv/.dev
	@tools/audit

docs: .venv/.dev
	$(BIN)/python -m sphinx --fresh-env --fail-on-warning --keep-going --quiet -b html -d build/doctrees docs build/docs
	$(BIN)/python -m pytest --quiet tests/unit/test_docs.py $(PYTEST_ARGS)
	@echo "build/docs/index.html"

bench: .venv/.dev
	$(BIN)/python benchmarks/dispatch.py
	$(BIN)/python benchmarks/footprint.py
	$(BIN)/python benchmarks/cnm.py
	$(BIN)/python benchmarks/tracing.py

bench-engine: .venv/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/engine.py --engine $(ENGINE) --json build/engine-$(ENGINE).json --svg docs/engine-benchmark.svg

bench-overlay: .venv/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/overlay.py --engine $(ENGINE) --json build/overlay-$(ENGINE).json

bench-scale: .venv/.dev
	@mkdir -p build
	$(BIN)/python benchmarks/scale.py --json build/scale.json --svg docs/pictures/scaling.svg

parity: .venv/.dev
	$(BIN)/python -m pytest tests/engine/parity --parity-table

release: .venv/.dev
	@tools/release

clean:
	rm -rf .venv .audit build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache

.venv/.run: $(SETUP_INPUT)
	tools/setup run

.venv/.dev: $(SETUP_INPUT)
	tools/setup dev
