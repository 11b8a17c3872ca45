# Everything runs in .venv with the pinned packages of requirements.lock.
#   make train                        the main job: WaRA on fundus images
#   make train CFG=chest_xray_lora.yaml ARGS="--set seed=1"
#   make test                         tests, linter, types
#   make slow                         the tests that take longer
#   make test-faults                  kills, damage and bad images, many of each kind
#   make licences                     docs/licences.md from what is installed
#   make sbom                         a bill of materials (CycloneDX) of what is installed

PYTHON ?= python3
CFG ?= fundus_wara.yaml
ARGS ?=
BIN := .venv/bin
# Written last, so that an interrupted installation is made again.
READY := .venv/.installed

# Two processes with one thread each use two cores better than one process with two.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.PHONY: train test slow test-faults lint lock licences sbom clean

# A second `make train` is meant to train again, so it replaces the run folder of the first.
train: $(READY)
	$(BIN)/python train.py --cfg $(CFG) $(if $(findstring --resume,$(ARGS)),,--overwrite) $(ARGS)

test: $(READY)
	$(PYTEST)
	$(MAKE) --no-print-directory lint

# Kills and signals wait more than they compute; they have a target of their own.
slow: $(READY)
	$(PYTEST) -m slow --ignore tests/faults

test-faults: $(READY)
	$(PYTEST) tests/faults -m "slow or not slow" --faults full

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/mypy

$(READY): requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "wara needs Python 3.11 or later")'
	$(PYTHON) -m venv .venv
	@echo "installing the pinned packages into .venv: several minutes, 7 GB"
	$(BIN)/python -m pip install --quiet --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $@

# Needs uv. The result names versions and what their files hash to, on every platform: where packages
# come from is the machine's business.
lock:
	{ sed -n '/^#/p' requirements.lock; uv pip compile pyproject.toml --universal --quiet \
	  --extra baselines --extra dashboard --extra dev --extra dicom --extra explain --extra export \
	  --extra papers --extra ray --extra tensorboard \
	  --generate-hashes --no-emit-index-url --no-header --no-annotate; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

licences: $(READY)
	$(BIN)/python tools/licences.py

# What is installed, as CycloneDX, in build/sbom.cdx.json. The tool that writes it has its own place.
sbom: $(READY)
	$(PYTHON) -m venv build/sbom
	build/sbom/bin/python -m pip install --quiet cyclonedx-bom==7.5.0
	build/sbom/bin/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible \
	  --output-format JSON --output-file build/sbom.cdx.json $(BIN)/python

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache build dist *.egg-info
