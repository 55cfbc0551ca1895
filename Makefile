# Every target builds .venv by itself; it needs Python >= 3.11 with its headers, g++ and make.
PYTHON  ?= python3
VENV    := .venv
BIN     := $(VENV)/bin
READY   := $(VENV)/.stamp
OUT     := out
RESULTS := bench/results/cpu
FUZZ_MINUTES ?= 10

# One thread a test process and one kernel cache for all of them: the C++ kernels are keyed on their source.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/$(OUT)/inductor
PYTEST   := $(TEST_ENV) $(BIN)/python -m pytest -n 2 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-all fuzz faults bench bench-gpu lint clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fxopt needs Python >= 3.11; set PYTHON=")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV) (about a minute and a half)"
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[test,demo,graph]"
	@touch $@

demo: $(READY)  ## train a small Llama under eager, Inductor and fxopt; one table, one chart
	$(BIN)/python examples/compare.py

test: lint  ## lint, types and every test that is not slow
	$(PYTEST) -m "not slow"
	TRITON_INTERPRET=1 $(PYTEST) -m "not slow" tests/interpret

test-all: lint  ## the same with the slow tests
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) tests/interpret

fuzz: $(READY)  ## random modules under every option against fp64, FUZZ_MINUTES=10 (docs/reliability.md)
	$(TEST_ENV) $(BIN)/python -m fxopt.testing.fuzz --minutes $(FUZZ_MINUTES) --corpus $(OUT)/fuzz --json $(OUT)/fuzz.json

faults: $(READY)  ## rewrite the table of faults in docs/reliability.md from the tests
	$(BIN)/python tests/faults.py

bench: $(READY)  ## measure on this machine and rewrite the README's table (about two hours)
	@code=0; \
	$(BIN)/python bench/step.py --json $(RESULTS)/step.json || code=1; \
	$(BIN)/python bench/compile_time.py --json $(RESULTS)/compile_time.json || code=1; \
	$(BIN)/python bench/linear_cross_entropy.py --json $(RESULTS)/linear_cross_entropy.json || code=1; \
	$(BIN)/python bench/norm.py --json $(RESULTS)/norm.json || code=1; \
	$(BIN)/python bench/precision.py --json $(RESULTS)/precision.json || code=1; \
	$(BIN)/python bench/memory.py --part budgets --json $(RESULTS)/memory.json || code=1; \
	$(BIN)/python bench/memory.py --part time --json $(RESULTS)/memory_time.json || code=1; \
	$(BIN)/python bench/explain.py --json $(RESULTS)/explain.json || code=1; \
	$(BIN)/python bench/memory_model.py --json $(RESULTS)/memory_model.json || code=1; \
	$(BIN)/python bench/fuzz.py --json $(RESULTS)/fuzz.json || code=1; \
	$(BIN)/python bench/readme.py && exit $$code

bench-gpu: $(READY)  ## check and time the kernels on this machine's GPU (9 minutes; docs/gpu.md)
	$(BIN)/python bench/gpu/run.py

lint: $(READY)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy
	MYPYPATH=bench:examples $(BIN)/mypy bench examples

clean:  ## remove outputs, caches and builds; .venv stays
	rm -rf $(OUT) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
