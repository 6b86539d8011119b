# Two commands set up a fresh machine: `make demo` and `make test`. PYTHON picks the interpreter the .venv is made from.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*)

.PHONY: setup demo test lint format bench kernels readme clean

setup: .venv/installed

# Linked against no torch library, so the extension is rebuilt only when its own sources change. The tests need the
# extra lm-eval too: some 640 MB and a minute that the demo does without.
.venv/installed: EXTRAS := test,lint,report
.venv/tested: EXTRAS := test,lint,report,lm-eval,serve,test-serve
.venv/installed .venv/tested: pyproject.toml constraints.txt setup.py $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing icl_ft_fast and building its extension (about two minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]" 2> .venv/pip.log \
		|| { cat .venv/pip.log >&2; exit 1; }
	@touch .venv/installed $@

demo: setup
	@$(BIN)/icl-ft-fast demo

test: .venv/tested
	@$(BIN)/python -m pytest -q

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i csrc/*.cpp csrc/*.h

bench: setup
	@$(BIN)/python -m benchmarks

# Compiles the Triton kernels for every target, or those in TARGETS; needs no GPU.
kernels: setup
	@$(BIN)/python -m benchmarks.kernels $(TARGETS)

# Rewrites the demo's output in README.md.
readme: setup
	@$(BIN)/python -m benchmarks.readme

clean:
	rm -rf .venv build *.egg-info icl_ft_fast/_C*.so
