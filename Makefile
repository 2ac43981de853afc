# Every target sets up what it needs: a private .venv with pinned packages and the native library.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CONSTRAINED := -c requirements/constraints.txt
NATIVE := $(wildcard csrc/* csrc/*/*)
ANTIBERTY := .cache/antiberty
ANTIBERTY_FILES := AntiBERTy_md_smooth/config.json AntiBERTy_md_smooth/pytorch_model.bin vocab.txt
HUGGINGFACE_TESTS := .cache/transformers-tests

export HF_HUB_OFFLINE = 1

.DELETE_ON_ERROR:
.PHONY: help run test test-all test-abi test-compat setup lint format clean

help: ## this list (default)
	@grep -hE '^[a-z-]+:.*## ' Makefile | awk -F ':.*## ' '{ printf "make %-11s %s\n", $$1, $$2 }'

run: setup ## a real BERT through stock HuggingFace and fastbert: parity, speed, a plot
	$(BIN)/fastbert bench

test: setup $(ANTIBERTY)/done $(HUGGINGFACE_TESTS)/done ## style, types and every test but the slow ones
	$(BIN)/python -m pytest -p tests.rooms -m "not slow" tests

test-all: setup $(ANTIBERTY)/done $(HUGGINGFACE_TESTS)/done ## the same and the slow ones, then test-compat and test-abi
	$(BIN)/python -m pytest -p tests.rooms tests
	$(MAKE) test-compat test-abi

# noxfile.py's rows; 16 GB below .cache, and Python 3.10, 3.12 and 3.13 must be on the machine
test-compat: setup $(ANTIBERTY)/done ## one wheel beside transformers 5.11, 5.17 and newest, torch 2.11 and newest
	$(BIN)/nox

test-abi: setup $(ANTIBERTY)/done ## the same rows: the one library's ops, CPU and emulated CUDA, in each torch
	$(BIN)/nox -- tests/ops -k "cuda or cpu"

setup: $(VENV)/done ## .venv, pinned packages, native library

lint: setup ## ruff and mypy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

format: setup ## ruff's format and its safe repairs
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## removes everything that was built, fetched or cached here
	rm -rf $(VENV) .cache build *.egg-info fastbert/_native.so fastbert/_native.json fastbert-bench.png
	rm -rf .mypy_cache .ruff_cache .pytest_cache .benchmarks .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +

# torch first and alone, so that nothing else chooses its version
$(VENV)/torch: requirements/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "fastbert needs Python 3.10 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV): torch"
	@rm -rf $(VENV)
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install -qq $(CONSTRAINED) torch
	@touch $@

$(VENV)/done: $(VENV)/torch pyproject.toml setup.py $(NATIVE) $(wildcard requirements/*)
	@echo "Setting up $(VENV): packages and the native library"
	@$(PIP) install -qq $(CONSTRAINED) setuptools ninja
	@$(PIP) install -qq $(CONSTRAINED) --no-build-isolation -e '.[dev]'
	@$(PIP) install -qq --no-deps --require-hashes -r requirements/demo.txt
	@$(BIN)/python -c 'from fastbert import native; n = native.load(); print("native library:", n.reason or "built"); print("its CUDA half:", n.cuda_reason or "built")'
	@touch $@

$(ANTIBERTY)/done: requirements/antiberty.txt | $(VENV)/torch
	@echo "Fetching the AntiBERTy checkpoint for the tests"
	@rm -rf $(ANTIBERTY) && mkdir -p $(ANTIBERTY)
	@$(PIP) download -qq --no-deps --require-hashes -d $(ANTIBERTY) -r $<
	@cd $(ANTIBERTY) && $(abspath $(BIN))/python -m zipfile -e antiberty-*.whl wheel && cd wheel/antiberty/trained_models && mv $(ANTIBERTY_FILES) ../../..
	@rm -rf $(ANTIBERTY)/wheel $(ANTIBERTY)/*.whl
	@touch $@

# pip asks an sdist for its metadata, which takes setuptools: hence after the packages
$(HUGGINGFACE_TESTS)/done: requirements/huggingface_tests.txt | $(VENV)/done
	@echo "Fetching HuggingFace's common model tests"
	@rm -rf $(HUGGINGFACE_TESTS) && mkdir -p $(HUGGINGFACE_TESTS)
	@$(PIP) download -qq --no-deps --no-binary :all: --no-build-isolation --require-hashes -d $(HUGGINGFACE_TESTS) -r $<
	@cd $(HUGGINGFACE_TESTS) && name=$$(basename transformers-*.tar.gz .tar.gz) && tar -xzf $$name.tar.gz $$name/tests && rm $$name.tar.gz
	@touch $@
