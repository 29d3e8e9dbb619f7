# make demo: verify the theory on problems drawn anew (SEED=N: on those of one seed), write out/report.html, then blend
# images into out/sheet.png. make test: lint, types, tests. Both set up .venv first.

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready
SOURCES := $(patsubst %/__init__.py,%,$(wildcard $(addsuffix /__init__.py,\
	sdeblend toy stablediffusion proofs_checks tests benchmarks)))
# One thread a worker: two workers with a thread pool each are slower than two without.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(JOBS)

.PHONY: demo test nightly notebooks bench clean

demo: $(READY)
	$(BIN)/sdeblend verify $(if $(SEED),--seed $(SEED)) --report out/report.html
	$(BIN)/python -m stablediffusion.small.demo --out out/sheet.png

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy $(SOURCES)
	$(PYTEST)

nightly: $(READY)
	HYPOTHESIS_PROFILE=nightly $(PYTEST) -m hypothesis
	HYPOTHESIS_PROFILE=nightly $(PYTEST) tests/stablediffusion/blending/test_parity.py

notebooks: $(READY)
	$(BIN)/jupytext --quiet --set-kernel python3 --to ipynb --execute notebooks/*.py

bench: $(READY)
	$(BIN)/python -m benchmarks

$(READY): pyproject.toml constraints.txt
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo >&2 \
	"sdeblend needs Python 3.11 or newer, found $$($(or $(PYTHON),false) --version 2>/dev/null || echo none);" \
	"name one with: make PYTHON=/path/to/python3.11"; exit 1; }
	@echo "Setting up .venv, a few minutes and once only ..."
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -e '.[test]' -c constraints.txt
	@touch $@

clean:
	rm -rf .venv out build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .mypy_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
