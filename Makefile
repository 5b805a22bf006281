# make install   .venv with everything, the native extension included; again only when something it is made from changed
# make train     the default run on the embedded data set
# make test      install, lint, test
# make bench     every op and whole steps against what one would use instead, a quarter of an hour: benchmarks/results/latest-cpu.json
# make bench-gpu the same on a GPU: benchmarks/results/latest-cuda.json
# make bench-compare  the last run against the record of this kind of machine; fails on a regression beyond the noise
# make bench-accept   the last run becomes the record that docs/performance.md shows, one of another machine stays beside it
# make prove-gpu compile every GPU kernel for every architecture and predict times, no GPU needed, into benchmarks/static/
# make docs     the documentation as a site, strictly, without the network: build/site/index.html
# Settings: PYTHON=python3.12  WORKERS=4 (test processes)  ARGS="training.max_steps=20"  CROSSMASK_CUDA=0  CROSSMASK_CUDA_ARCHITECTURES="80;90"  OLD=a.json NEW=b.json

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.PHONY: install train test bench bench-gpu bench-compare bench-on bench-accept prove-gpu prove docs lint links clean

# the first Python that is not too old or too new
PYTHON := $(or $(PYTHON),$(shell for python in python3 python3.13 python3.12 python3.11 python3.10; do \
  $$python -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 14))' 2>/dev/null && { echo $$python; break; }; done))
BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALLED := .venv/.installed
ARGS ?=
WORKERS ?= 2
OLD ?= benchmarks/results
NEW ?= benchmarks/results/latest-cpu.json

install: $(INSTALLED)

$(INSTALLED): pyproject.toml setup.py CMakeLists.txt constraints.txt $(wildcard csrc/*)
	@test -n "$(PYTHON)" || { echo "No Python from 3.10 to 3.13 was found: install one, or say make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python -a -x $(BIN)/pip || { rm -rf .venv; $(PYTHON) -m venv .venv; } || { rm -rf .venv; \
	  echo "$(PYTHON) cannot make a virtual environment: install its venv module (Debian, Ubuntu: apt install python3-venv)"; exit 1; }
	@echo "Installing into .venv; the first time this fetches torch, a few gigabytes with its CUDA libraries"
	@$(PIP) install -qq -c constraints.txt --upgrade pip setuptools wheel cmake ninja
	@$(PIP) install $$(test -t 1 || echo -qq) -c constraints.txt torch torchvision
	@# in its own build environment: where torch is a CUDA build, DeepSpeed's setup script wants to see a CUDA toolkit
	@$(PIP) install -qq -c constraints.txt deepspeed
	@$(PIP) install -qq --no-build-isolation -c constraints.txt -e '.[dev]'
	@$(BIN)/python -c "import json; r = json.load(open('kernels/_C.json')); \
	  [print('Note:', r[k]) for k in ('reason', 'cuda_reason') if r[k]]"
	@touch $@
	@echo "Installed. $(BIN)/crossmask doctor tells what runs here"

train: install
	@$(BIN)/crossmask train recipes/syncmask-emoji.yaml $(ARGS)

test: lint
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(ARGS)

# the timeout is of an item, which may measure a whole step; our own table says what pytest-benchmark's would
bench:
	@$(MAKE) --no-print-directory bench-on DEVICE=cpu

bench-gpu:
	@$(MAKE) --no-print-directory bench-on DEVICE=cuda

bench-on: install
	@$(BIN)/python -m pytest -q benchmarks/bench_suite.py --device $(DEVICE) --timeout 900 \
	  -o console_output_style=classic --benchmark-only --benchmark-quiet -r fE $(ARGS)

bench-compare: install
	@$(BIN)/python benchmarks/compare.py $(OLD) $(NEW) $(ARGS)

bench-accept: install
	@$(BIN)/python benchmarks/performance.py --accept $(NEW) $(ARGS)

prove-gpu: install
	@$(BIN)/python benchmarks/prove_attention.py $(ARGS)
	@$(BIN)/python benchmarks/prove_selection.py $(ARGS)
	@$(BIN)/python benchmarks/prove_losses.py $(ARGS)
	@$(BIN)/python benchmarks/prove_ema.py $(ARGS)
	@$(BIN)/python benchmarks/prove_roofline.py $(ARGS)

prove: prove-gpu

docs: install links
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)
	@echo "Written: build/site/index.html; with search: python3 -m http.server -d build/site"

# mypy knows the code by its installed name, so it is shown the wings under that name; the paths it prints are the real ones
lint: install links
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { echo "Run: $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy 2>&1 | sed 's#build/typing/crossmask/##'

links:
	@mkdir -p build/typing/crossmask
	@ln -sfn ../../../kernels build/typing/crossmask/kernels
	@ln -sfn ../../../engine build/typing/crossmask/engine

clean:
	rm -rf .venv build dist crossmask.egg-info kernels/_C.abi3.so kernels/_C.json .pytest_cache .mypy_cache .ruff_cache .benchmarks .hypothesis
	find kernels engine recipes tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
