# Every target but `gpu` installs what it needs into .venv, once: pinned by constraints.txt, CPU only.
PYTHON ?= python3
GPU_PYTHON ?= python3
GPU_MINUTES ?= 9
GPU_RESULTS ?= benchmarks/results
JOBS ?= 2
# An index with CPU wheels of torch, if pip's own has none: on Linux the default wheel brings
# gigabytes of CUDA that nothing below uses. PyTorch's installation page names the index. Where uv is
# installed, TORCH_BACKEND=cpu is enough: uv knows the indexes of PyTorch.
TORCH_INDEX ?=
TORCH_BACKEND ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
READY := .venv/.glazoo-ready
# Installs a torch, the second argument, into the environment of a Python, the first.
with_torch = $(if $(TORCH_BACKEND),uv pip install --quiet --python $(1) --torch-backend $(TORCH_BACKEND),$(1) -m pip \
  --disable-pip-version-check install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))) $(2)
TORCH_PIN = $(shell grep -i '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help setup demo notebooks test test-all test-newest lint docs dist hub gpu bench clean

help: ## list the targets
	@echo "make targets (each installs what it needs into .venv first, except gpu and clean):"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1|\2/p' $(firstword $(MAKEFILE_LIST)) \
	  | while IFS='|' read -r name text; do printf '%-11s %s\n' "$$name" "$$text"; done

setup: $(READY) ## only install: .venv with glazoo (editable), its dependencies and the test tools

$(READY): pyproject.toml setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "glazoo needs Python 3.11 or newer; $(PYTHON) is older or missing. Try: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)"; exit 1; }
	@echo "== setup: installing the pinned dependencies into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) pip setuptools
	@# torch first and alone: once its CPU wheel is in place, no later step looks for another one.
	@$(call with_torch,$(BIN)/python,--no-deps "$(TORCH_PIN)")
	@$(PIP) --quiet --no-build-isolation --editable '.[all,dev]'
	@touch $@

demo: $(READY) ## train, convert, verify and train on small Mamba2 models; prints one table (minutes, CPU)
	@echo "== demo: train small Mamba2 models, convert them, verify equality, train both on"
	$(BIN)/python -P examples/demo.py

test: $(READY) ## the tests that run in minutes on two CPU cores (no slow, no GPU tests)
	@echo "== test: pytest on $(JOBS) processes, without the tests marked slow or gpu"
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu"

ECOSYSTEM := .venv/.glazoo-ecosystem
$(ECOSYSTEM): $(READY)
	@echo "== setup: the packages that test-all tries converted models with"
	@$(PIP) --no-build-isolation --editable '.[ecosystem,cpu,export]'
	@touch $@

test-all: $(ECOSYSTEM) ## every test that needs no GPU
	@echo "== test-all: pytest on $(JOBS) processes, without the tests marked gpu"
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not gpu"

notebooks: $(ECOSYSTEM) ## run the notebooks of examples/ anew, in place
	@echo "== notebooks: every cell again; what it shows is written into the file"
	$(BIN)/python -P docs/notebooks.py

# torch stays pinned without an index of CPU wheels: the default one brings gigabytes of CUDA.
NEWEST := build/newest
NEWEST_TORCH = $(if $(TORCH_INDEX)$(TORCH_BACKEND),torch,$(TORCH_PIN))
.PHONY: $(NEWEST)/newest
$(NEWEST)/newest:
	@$(PYTHON) -m venv --clear $(NEWEST)
	@$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade pip setuptools
	@$(call with_torch,$(NEWEST)/bin/python,"$(NEWEST_TORCH)")
	@$(NEWEST)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --no-build-isolation --editable '.[all,dev]' "$(NEWEST_TORCH)"

test-newest: $(NEWEST)/newest ## converters, models and layers with the newest release of every dependency
	@echo "== test-newest: the newest releases, $(NEWEST_TORCH)$(if $(TORCH_INDEX)$(TORCH_BACKEND),, as pinned: set TORCH_INDEX or TORCH_BACKEND to have the newest)"
	@$(NEWEST)/bin/python -m pip --disable-pip-version-check list --format freeze | grep -iE '^(torch|triton|transformers|pydantic|accelerate|datasets|huggingface_hub|tokenizers|numpy)=='
	$(NEWEST)/bin/pytest -n $(JOBS) --dist worksteal -m "not slow and not gpu" tests/converters tests/models tests/layers

lint: $(READY) build/tree ## ruff (lint and format) and mypy --strict
	@echo "== lint: ruff check, ruff format --check, mypy --strict"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@! grep -rnE 'make_block_ptr|tl\.advance' --include='*.py' kernels glazoo benchmarks || { echo "block pointers no longer compile: use pointers and masks"; exit 1; }
	cd build/tree && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p glazoo

SITE := .venv/.glazoo-docs
$(SITE): $(READY)
	@echo "== setup: the packages that docs builds the site with"
	@$(PIP) --no-build-isolation --editable '.[docs]'
	@touch $@

docs: $(SITE) ## the documentation site, into build/docs/site; warnings are errors
	@echo "== docs: pages from docs/, examples/, the specs, the theory and the command line; then the site"
	$(BIN)/python docs/generate.py build/docs/pages
	$(BIN)/zensical build --config-file build/docs/mkdocs.yml --clean --strict > build/docs/log 2>&1 || { cat build/docs/log; exit 1; }
	@# Of docstrings it warns without counting them.
	@! grep -E '^(griffe|mkdocs)' build/docs/log

RELEASE := .venv/.glazoo-release
$(RELEASE): $(READY)
	@echo "== setup: the packages that dist checks with"
	@$(PIP) --no-build-isolation --editable '.[release]'
	@touch $@

# What an empty environment gets the wheel with, one after the other; core is none of the extras.
EXTRAS ?= core cli models train eval compare cluster verify plots cpu fla export all
EMPTY := build/empty
IN_EMPTY := $(EMPTY)/bin/python -m pip --disable-pip-version-check install --quiet --constraint constraints.txt

dist: $(RELEASE) ## wheel and sdist into dist/, checked and installed into empty environments with each extra
	@rm -rf dist
	$(BIN)/python -P -m build --no-isolation
	$(BIN)/twine check --strict dist/*
	@set -e; for extra in $(EXTRAS); do \
	  echo "== dist: the wheel with $$extra in an empty environment"; \
	  $(PYTHON) -m venv --clear $(EMPTY); \
	  $(call with_torch,$(EMPTY)/bin/python,"$(TORCH_PIN)"); \
	  $(IN_EMPTY) "$$(ls dist/*.whl)$$(echo "[$$extra]" | sed 's/\[core\]//')"; \
	  $(EMPTY)/bin/python -I tests/packaging/smoke.py $$extra; \
	done
	@echo "== dist: the sdist in an empty environment"
	@$(PYTHON) -m venv --clear $(EMPTY)
	@$(call with_torch,$(EMPTY)/bin/python,"$(TORCH_PIN)")
	@$(IN_EMPTY) dist/*.tar.gz
	$(EMPTY)/bin/python -I tests/packaging/smoke.py core
	@rm -rf $(EMPTY)

hub: ## a repository for the kernels hub, in build/hub: kernels/ as it is, with its metadata
	@rm -rf build/hub && mkdir -p build/hub/build/torch-universal
	@cp kernels/*.py LICENSE build/hub/build/torch-universal
	@sed -n 's/^version = "\([0-9]*\)\.\([0-9]*\)\..*/{"id": "glazoo_kernels_\1_\2", "name": "glazoo-kernels", "version": \2, "license": "MIT", "python-depends": [], "backend": {"type": "cuda"}}/p' pyproject.toml > build/hub/build/torch-universal/metadata.json

gpu: build/gpu ## kernel tests and timings on this machine's GPU, with GPU_PYTHON's own torch and triton
	@echo "== gpu: nothing is installed; $(GPU_PYTHON) must have torch, triton and pytest; at most $(GPU_MINUTES) minutes"
	@$(GPU_PYTHON) -c 'import pytest, sys, torch, triton; torch.cuda.is_available() or sys.exit("no GPU: torch.cuda.is_available() is False for $(GPU_PYTHON)")'
	@# -P: the folder that make runs in holds the whole glazoo.
	PYTHONPATH=$(CURDIR)/build/gpu $(GPU_PYTHON) -P benchmarks/gpu.py --tests --minutes $(GPU_MINUTES) --results $(GPU_RESULTS)

bench: $(READY) ## time the CPU engines
	@echo "== bench: timings of the CPU engines"
	$(BIN)/python benchmarks/cpu.py

clean: ## remove what the targets made, .venv included
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# The package as it is installed, made of links: mypy follows no import hook, which is what an
# editable install uses to find glazoo.kernels and glazoo.specs.
.PHONY: build/tree build/gpu
build/tree:
	@rm -rf $@ && mkdir -p $@/glazoo
	@for path in glazoo/* kernels specs; do ln -s "../../../$$path" "$@/glazoo/"; done

# glazoo.kernels alone: kernels import nothing of glazoo, so a GPU machine needs only torch and triton.
build/gpu:
	@rm -rf $@ && mkdir -p $@/glazoo
	@echo '"""Stand-in for the package, so that glazoo.kernels needs none of its dependencies."""' > $@/glazoo/__init__.py
	@ln -s ../../../kernels $@/glazoo/kernels
