# Every target sets up what it needs; the only things that must be there are Python 3.11-3.13, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
BENCH := .venv-bench
OPTIMUM := .venv-optimum

# For tests and benchmarks that import onnxruntime without the server, which sets it by itself.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: setup demo test test-quick protos fmt lint type check bench bench-quick bench-online bench-engine constraints clean

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

constraints: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > frozen.new
	sed -n '1,/^# torch is pinned/p' constraints.txt | cat - frozen.new > constraints.new
	sed -n '/^# The CUDA variant/,$$p' constraints.txt >> constraints.new
	mv constraints.new constraints.txt && rm frozen.new

clean:
	rm -rf $(VENV) $(BENCH) $(OPTIMUM) build dist
