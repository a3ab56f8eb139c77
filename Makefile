# Every target sets up what it needs; the only things that must be there are Python 3.11-3.13, make and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test protos fmt lint type check bench bench-online constraints clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(STAMP)
	$(BIN)/python models/fr-en/demo.py

test: $(STAMP)
	$(BIN)/python -m pytest

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

bench: $(STAMP)
	$(BIN)/python benchmarks/engine.py

# Takes about an hour and a half, in the environment with ctranslate2 beside Beamline that `make bench` makes.
bench-online:
	@test -x .venv-bench/bin/python || { echo "there is no .venv-bench yet: make bench makes it"; exit 1; }
	PYTHONPATH=protos:server:export:client .venv-bench/bin/python benchmarks/online.py

constraints: $(STAMP)
	$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > frozen.new
	sed -n '1,/^# torch is pinned/p' constraints.txt | cat - frozen.new > constraints.new
	sed -n '/^# The CUDA variant/,$$p' constraints.txt >> constraints.new
	mv constraints.new constraints.txt && rm frozen.new

clean:
	rm -rf $(VENV) build dist
