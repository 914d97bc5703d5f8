# Every target makes .venv and installs what it needs by itself. Another interpreter: make test PYTHON=python3.12
PYTHON ?= python3
TORCH ?= 2.13.0

VENV := .venv
STAMP := $(VENV)/.installed
# The tools of the virtual environment first: DeepSpeed looks for its `ninja` on PATH, tests for `accelerate`.
WITH_VENV = PATH="$(CURDIR)/$(VENV)/bin:$$PATH"
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.DEFAULT_GOAL := help
.PHONY: help demo test test-full lint compilers

help:  ## print this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## */  make \1\t/' | expand -t 18

demo: $(STAMP)  ## train, evaluate, merge and recommend on MovieLens-100K with a tiny model
	@$(WITH_VENV) genrec demo

test: $(STAMP) compilers  ## the tests that end in minutes on two cores
	@$(WITH_VENV) OMP_NUM_THREADS=1 python -m pytest -q --numprocesses 2 --dist loadfile

test-full: $(STAMP) compilers  ## all tests but those that need the network
	@$(WITH_VENV) python -m pytest -q -m 'not hub$(if $(HAS_GPU),, and not gpu)'

lint: $(STAMP)  ## formatting, lint and types
	@$(WITH_VENV) ruff check .
	@$(WITH_VENV) ruff format --check .
	@$(WITH_VENV) mypy

# Without a GPU torch comes first and alone, because only this step should ask PyTorch's own index: that is where the
# build without CUDA's 2.6 GB lies. Where the index cannot be reached, pip goes on with what its other sources have.
$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		found=$$(command -v $(PYTHON) >/dev/null && $(PYTHON) --version 2>&1 || echo "not found"); \
		echo "error: genrec_llm needs Python 3.11 or newer; '$(PYTHON)' is $$found"; \
		echo "       name another one: make $(or $(MAKECMDGOALS),test) PYTHON=python3.12"; exit 1; }
	@[ -x $(VENV)/bin/python ] || $(PYTHON) -m venv $(VENV)
	@echo "Installing into $(VENV) (a minute or two; about 2 GB, more where torch brings CUDA) ..."
ifeq ($(HAS_GPU),yes)
	@$(VENV)/bin/python -m pip install --quiet -e ".[test]"
else
	@$(VENV)/bin/python -m pip install --quiet --no-deps --retries 1 --timeout 15 \
		--extra-index-url https://download.pytorch.org/whl/cpu torch==$(TORCH)
	@$(VENV)/bin/python -m pip install --quiet torch==$(TORCH) -e ".[test]"
endif
	@touch $@

# DeepSpeed compiles its communication between processes on a CPU at the first start.
compilers: $(STAMP)
	@[ "$$(uname -s)" != Linux ] || { missing=; \
		command -v "$${CXX:-c++}" >/dev/null || missing="$$missing $${CXX:-g++}"; \
		$(WITH_VENV) sh -c 'command -v ninja' >/dev/null || missing="$$missing ninja"; \
		$(VENV)/bin/python -c 'import os, sys, sysconfig; \
			sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))' || missing="$$missing Python.h"; \
		[ -z "$$missing" ] || { echo "note: missing:$$missing. The tests that run DeepSpeed with several processes need them."; \
			echo "      Debian, Ubuntu: apt install g++ ninja-build python3-dev"; }; }
