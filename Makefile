# linocut: one command for each thing. Every target sets up what it needs in .venv and does only what is out of date.
#
#   make demo    install, build, draw demo.png with the embedded ternary model     (MODEL=embedded-binary for binary)
#   make test    install everything and run the tests                              (PYTEST_ARGS="tests/kernels -x")
#   make slow    run those that take long: thousands of requests, damaged files, kills, fifty pictures
#   make interop let stable-diffusion.cpp draw our files (installs it: a build of ten minutes and more)
#   make lint    ruff and mypy                   make build   build the C++ module again
#   make wheel   dist/: manylinux wheel, sdist   make clean   remove what was built; make distclean: .venv too

# Empty: the first of python3.11, python3.12, ... that is there; Debian's is installed if there is none.
PYTHON ?=
VENV ?= .venv
BIN := $(VENV)/bin
PROMPT ?= two red apples and a blue cup
MODEL ?= embedded
SEED ?= 7
OUT ?= demo.png
PYTEST_ARGS ?=

PIP := $(BIN)/python -m pip --disable-pip-version-check install -qq --constraint constraints.txt
# What an extra asks for, without linocut itself, whose C++ module would be built once more.
REQUIREMENTS := import sys, tomllib; extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	print(*(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
NATIVE := CMakeLists.txt pyproject.toml $(wildcard csrc/*)

.DEFAULT_GOAL := help
.PHONY: help demo test slow interop lint build wheel clean distclean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//;2,/^$$/p' Makefile

# The stamps record what .venv holds; a change of the files that decide it makes them run again.
$(VENV)/.created:
	python=$$(scripts/prepare_debian.sh $(PYTHON)) && $$python -m venv $(VENV)
	@touch $@

# torch first: everything after it then accepts the build that is there.
$(VENV)/.run: $(VENV)/.created constraints.txt $(NATIVE)
	@echo "installing torch, then linocut with its dependencies and its C++ module (a minute or two) ..."
	$(PIP) torch
	$(PIP) scikit-build-core nanobind ninja cmake
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@echo "installing what the tests need ..."
	scripts/prepare_debian.sh --tests $(BIN)/python >/dev/null
	$(BIN)/python -c '$(REQUIREMENTS)' test serve release | $(PIP) --requirement /dev/stdin
	@touch $@

$(VENV)/.lint: $(VENV)/.run
	$(PIP) ruff mypy
	$(BIN)/python -c '$(REQUIREMENTS)' serve | $(PIP) --requirement /dev/stdin
	@touch $@

build: $(VENV)/.run
	@$(BIN)/python -c 'from linocut import _native; print("built:", _native.build_info())'

demo: $(VENV)/.run
	$(BIN)/linocut generate "$(PROMPT)" --model $(MODEL) --seed $(SEED) --output $(OUT) --force
	@echo "the picture is $(abspath $(OUT)); draw your own: $(BIN)/linocut generate \"a green frog above a book\""

test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not slow" $(PYTEST_ARGS)

slow: $(VENV)/.test
	$(BIN)/python -m pytest -m slow -rs $(PYTEST_ARGS)

# dashscope is wanted for a file alone: the vocabulary of Qwen.
$(VENV)/.interop: $(VENV)/.test
	@echo "building stable-diffusion.cpp (ten minutes and more) ..."
	$(BIN)/python -c '$(REQUIREMENTS)' interop | $(PIP) --requirement /dev/stdin
	$(PIP) --no-deps dashscope
	@touch $@

interop: $(VENV)/.interop
	$(BIN)/python -m pytest -rs tests/integrations/test_sdcpp.py $(PYTEST_ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/mypy

wheel: $(VENV)/.test
	$(BIN)/python scripts/build_wheel.py dist

clean:
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -prune -exec rm -rf {} +
	rm -f $(VENV)/.run $(VENV)/.test $(VENV)/.interop

distclean: clean
	rm -rf $(VENV)
