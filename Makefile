# Every target makes the environment .venv when it is not there. The stamp makes a second call
# start at once, and a changed requirement re-install; it is written last, so an interrupted
# installation is not taken for a whole one.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*##/make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv

demo: $(STAMP)  ## train with and without a non-local block, and compare: output/demo/
	$(VENV)/bin/python tools/demo.py --output output/demo

test: $(STAMP)  ## run the tests
	OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile tests

lint: $(STAMP)  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# torch comes first: it brings setuptools, and detectron2 is built against it.
$(STAMP): setup.py constraints.txt tools/install_detectron2.py tools/detectron2_release_0_5.py
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(VENV)/bin/python tools/install_detectron2.py
	touch $@
