# Every target sets up what it needs; the only things that must be there are Python 3.11-3.13, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .venv-bench
OPTIMUM := .venv-optimum

# For tests and benchmarks that import onnxruntime without the server, which sets it by itself.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-quick protos fmt lint type check bench bench-quick bench-online bench-engine constraints locks sbom inventory clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo 'installing PyTorch and the rest into $(VENV); this takes some minutes'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	$(BIN)/beamline compile
	touch $@

demo: $(STAMP)
	$(BIN)/python models/fr-en/demo.py

# Two at a time, each with whole files: tests of a file share what they have exported and started.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# Whatever needs neither a model nor a process of its own: the engine, the server and what stands around them.
test-quick: $(STAMP)
	FUZZ_STEPS=500 $(BIN)/python -m pytest --hypothesis-profile=quick \
	  tests/unit/engine tests/unit/server tests/unit/test_architecture.py --ignore tests/unit/engine/ort

protos: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -I protos --python_out=protos --pyi_out=protos --grpc_python_out=protos \
	  protos/beamline/v1/generation.proto

fmt: $(STAMP)
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/buf lint

type: $(STAMP)
	$(BIN)/mypy

check: lint type test

# The peers stay out of the environment that the project is developed in, and optimum-onnx out of theirs.
bench: $(BENCH)/.installed $(OPTIMUM)/.installed
	$(BENCH)/bin/python benchmarks/side_by_side.py $(ARGS)

bench-quick: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/quick_gate.py $(ARGS)

bench-engine: $(STAMP)
	$(BIN)/python benchmarks/engine.py $(ARGS)

$(BENCH)/.installed: pyproject.toml constraints.txt benchmarks/requirements.txt
	$(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[dev]' --requirement benchmarks/requirements.txt
	touch $@

# Where optimum-onnx does not install, the tables say why; it is tried again the next time.
$(OPTIMUM)/.installed: benchmarks/requirements-optimum.txt
	rm -rf $(OPTIMUM)
	$(PYTHON) -m venv $(OPTIMUM)
	$(OPTIMUM)/bin/python -m pip install --quiet --disable-pip-version-check \
	  --requirement benchmarks/requirements-optimum.txt 2>$(OPTIMUM)/install.log && touch $@ || rm -rf $(OPTIMUM)/bin

# Takes about an hour and a half.
bench-online: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/online.py $(ARGS)

# Versions from what is installed here; the image's locks follow them.
constraints: $(STAMP)
	$(BIN)/python -m pip freeze --all --exclude pip --exclude-editable | sed 's/+cpu//' > frozen.new
	sed -n '1,/^# torch is pinned/p' constraints.txt | cat - frozen.new > constraints.new
	mv constraints.new constraints.txt && rm frozen.new && touch $(STAMP)
	$(MAKE) --no-print-directory locks

# What the image installs, with the hashes of its files. Versions that constraints.txt does not name (CUDA's libraries)
# stay as they are; ARGS=--upgrade renews them.
LOCK = $(BIN)/uv pip compile --quiet --custom-compile-command 'make locks' --no-annotate --generate-hashes --only-binary :all: \
  --python-version 3.11 --python-platform linux --constraint constraints.txt $(ARGS)
locks: $(STAMP)
	$(LOCK) pyproject.toml --extra server --extra moses --output-file deploy/docker/requirements-cpu.txt
	$(LOCK) pyproject.toml --extra server-gpu --extra moses --output-file deploy/docker/requirements-gpu.txt
	echo hatchling | $(LOCK) - --output-file deploy/docker/requirements-build.txt

# What the image holds in /opt/beamline, installed here the same way and written down in dist.
# VARIANT=gpu downloads gigabytes.
VARIANT ?= cpu
IMAGE := build/image
sbom: $(STAMP)
	rm -rf $(IMAGE)
	$(BIN)/python -m venv --without-pip $(IMAGE)/env
	$(BIN)/python -m pip --python $(IMAGE)/env/bin/python install --quiet --require-hashes --only-binary :all: \
	  --requirement deploy/docker/requirements-$(VARIANT).txt
	$(BIN)/python -m pip wheel --quiet --no-index --no-deps --no-build-isolation --wheel-dir $(IMAGE) .
	$(BIN)/python -m pip --python $(IMAGE)/env/bin/python install --quiet --no-index --no-deps $(IMAGE)/*.whl
	$(BIN)/python -m pip --python $(IMAGE)/env/bin/python check
	$(MAKE) --no-print-directory inventory OF=$(IMAGE)/env TO=dist/beamline-server-$(VARIANT)

# An environment's packages: a CycloneDX SBOM, and a table of licences; fails if a package tells none.
inventory:
	mkdir -p $(dir $(TO))
	$(BIN)/cyclonedx-py environment --pyproject pyproject.toml --output-reproducible --output-file $(TO).cdx.json \
	  $(ARGS) $(OF)/bin/python
	$(BIN)/pip-licenses --python $(OF)/bin/python --format markdown --with-urls --fail-on UNKNOWN \
	  --output-file $(TO).licenses.md

clean:
	rm -rf $(VENV) $(BENCH) $(OPTIMUM) build dist
