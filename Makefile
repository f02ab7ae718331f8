# `make run` does the main job, `make test` runs the tests; both set up what they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

# One intra-op thread per process: the tests and the benchmarks bring their own processes.
export OMP_NUM_THREADS ?= 1
# Every process would compile what it imports, which takes as long as importing it: torch 2 s, Dask with xarray 2 s.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help venv run demo test test-unit test-again test-gpu chaos lint format manifests bench cluster cluster-down images clean

help: ## what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(STAMP) ## .venv with everything installed, at the versions of constraints.txt

# uv takes seconds where pip takes minutes. It does not read what pip is configured with (an index, a folder of
# wheels), so it is told. Nothing is compiled as it is installed: of more than twenty thousand files one in ten is
# imported, and compiled then.
PIP_SAYS := $(BIN)/python -m pip config list | sed -nE "s/.*\.((extra-)?index-url|find-links)='(.*)'/--\1=\3/p"
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version.split()[0] + "; set PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --system-certs --index-strategy unsafe-best-match \
	  $$($(PIP_SAYS)) --constraint constraints.txt --editable '.[worker,operator,s3]' --group dev
	@touch $@

run: $(STAMP) ## the influences of 1400 handwritten digits on 300 others, then what they say
	$(BIN)/influence run examples/digits.yaml --output digits.zarr
	$(BIN)/influence show digits.zarr

demo: $(STAMP) ## the same job on a real Kubernetes on this machine, from nothing, watched live
	PYTHONPATH=tests/support $(BIN)/python tests/cluster/demo.py

# One part of the tests: $(call part,NAME,ARGUMENTS,PRIORITY). Each has a cache of its own, so that several may run at
# a time; one that runs beside another keeps what it prints until the end.
part     = nice -n $(or $(3),0) $(BIN)/python -m pytest --override-ini cache_dir=.pytest_cache/$(1) $(2) && touch .pytest_cache/$(1)/passed
beside   = { $(call part,$(1),$(2),$(3)); } >.pytest_cache/$(1).log 2>&1 &
PARALLEL := --numprocesses 2 --dist worksteal
NUMBERS  := tests/unit/influence_calculator
UNIT     := tests/unit tests/contract tests/integration

# What computes and waits for nobody takes, at the lowest priority, what the cluster's tests leave of the cores. What
# breaks a part of the cluster waits more than it computes: it has the cluster for itself, and the rest of what needs no
# cluster runs beside it.
test: $(STAMP) ## the tests that need no accelerator; brings up a Kubernetes cluster on this machine
	@rm -rf .pytest_cache; mkdir .pytest_cache; failed=0; export TEST_RUN=$$(date +%s); \
	$(call beside,numbers,$(PARALLEL) --timeout 1800 $(NUMBERS),19) numbers=$$!; \
	{ $(call part,cluster,$(PARALLEL) -m "not alone" tests/cluster); } || failed=1; \
	$(call beside,unit,$(PARALLEL) $(UNIT) --ignore=$(NUMBERS)) unit=$$!; \
	{ $(call part,alone,-m alone tests/cluster); } || failed=1; \
	wait $$unit || failed=1; wait $$numbers || failed=1; \
	cat .pytest_cache/unit.log .pytest_cache/numbers.log; \
	exit $$failed

test-unit: $(STAMP) ## the tests that need no cluster
	$(BIN)/python -m pytest $(PARALLEL) $(UNIT)

test-again: $(STAMP) ## the tests of `make test` that failed, one after another
	@failed=0; for part in cluster alone unit numbers; do \
	  [ ! -e .pytest_cache/$$part/passed ] || continue; \
	  case $$part in cluster | alone) folders=tests/cluster ;; numbers) folders=$(NUMBERS) ;; *) folders="$(UNIT)" ;; esac; \
	  $(BIN)/python -m pytest --override-ini cache_dir=.pytest_cache/$$part --last-failed $$folders || failed=1; \
	done; exit $$failed

test-gpu: $(STAMP) ## the tests that need a GPU; without one they fail
	$(BIN)/python -m pytest tests/gpu

chaos: $(STAMP) ## every kill at every moment; `make test` takes one moment for each
	@failed=0; export INFLUENCE_CHAOS=all; \
	$(BIN)/python -m pytest $(PARALLEL) -m "not alone" tests/cluster/test_kills.py || failed=1; \
	$(BIN)/python -m pytest -m alone tests/cluster/test_kills.py tests/cluster/test_outages.py || failed=1; \
	exit $$failed

lint: $(STAMP) ## ruff, mypy --strict, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache

format: $(STAMP) ## put the code into the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

manifests: $(STAMP) ## what is generated: the CRD from the spec, the chart's copies, charts/install.yaml; needs helm
	PATH="$${K8S_HOME:-$$HOME/.cache/influence-cluster}/bin:$$PATH" $(BIN)/python charts/manifests.py

bench: $(STAMP) ## the benchmarks: ratios against pyDVL, Kronfluence and a plain implementation; scores against retraining; many jobs on the test cluster
	@missed=0; \
	$(BIN)/python tests/benchmarks/run.py || missed=1; \
	$(BIN)/python tests/benchmarks/lds.py || missed=1; \
	PYTHONPATH=tests/support $(BIN)/python tests/benchmarks/operator_scale.py || missed=1; \
	exit $$missed

cluster: ## a real Kubernetes on this machine, for the tests: tests/cluster/machine/README.md
	@tests/cluster/machine/build.sh
	@tests/cluster/machine/up.sh

cluster-down: ## stop it; `tests/cluster/machine/down.sh --purge` forgets what it held, too
	@tests/cluster/machine/down.sh

images: ## build the images and load them into that cluster, or push them to IMAGE_REGISTRY
	@PYTHON=$(PYTHON) tests/cluster/machine/images.sh

clean: ## remove what `make` made
	rm -rf $(VENV) digits.zarr .mypy_cache .ruff_cache .pytest_cache
