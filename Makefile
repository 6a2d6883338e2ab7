# Every target creates the environment .venv if it is missing. The stamp file is written last, so
# an interrupted installation is repeated, and a changed requirement installs again.

PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.stamp
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
PYTEST := OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n auto --dist loadfile

# The oldest supported versions of Python, torch, torchvision and NumPy.
PYTHON_OLDEST ?= python3.10
OLDEST := .venv-oldest
PIP_OLDEST := $(OLDEST)/bin/python -m pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-oldest lint

help:  ## show this list
	@sed -n 's/^\([a-z-]*\):.*##/make \1\t/p' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install everything into .venv

demo: $(STAMP)  ## train with and without a non-local block, and compare: output/demo/
	$(VENV)/bin/python tools/demo.py --output output/demo

test: $(STAMP)  ## run the tests that take five minutes on two cores
	$(PYTEST) -m "not slow"

test-all: $(STAMP)  ## run all tests
	$(PYTEST)

test-oldest: $(OLDEST)/.stamp  ## run the tests of the core with the oldest supported versions
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n auto --dist loadfile -m "not slow" \
	    tests/layers tests/modeling tests/checkpoint tests/data tests/test_config.py \
	    tests/engine/test_launch.py

lint: $(STAMP)  ## check style and formatting
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

INSTALLER := tools/install_detectron2.py tools/detectron2_release_0_5.py

# torch comes first: it brings setuptools, and detectron2 is built against it.
$(STAMP): setup.py constraints.txt $(INSTALLER)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch torchvision setuptools
	$(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	$(VENV)/bin/python tools/install_detectron2.py --constraints constraints.txt
	touch $@

$(OLDEST)/.stamp: setup.py constraints-oldest.txt $(INSTALLER)
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(PIP_OLDEST) install -c constraints-oldest.txt torch torchvision numpy setuptools wheel
	$(PIP_OLDEST) install -c constraints-oldest.txt --no-build-isolation -e . \
	    hypothesis pytest pytest-xdist
	$(OLDEST)/bin/python tools/install_detectron2.py --constraints constraints-oldest.txt
	touch $@
