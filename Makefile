# make demo       finished Push-T trials on a machine without ROS, GPU or robot; creates .venv by itself
# make test       the test suite (slow tests left out); make test-slow runs those
# make test-faults  fault injection on the emulated cell in full; prints its figures, writes out/faults.json
# make test-soak  one hour of the emulated cell (SOAK_S=300 SOAK_DISCONNECTS=10 for a try); writes out/soak.json
# make lint       ruff and mypy
# make venv       .venv with what the demo needs; make venv-test: with what the tests need
# make clean      remove .venv and everything generated
#
# Variables: PYTHON (interpreter of .venv, 3.10 to 3.12), TORCH (requirement of the torch build), WORKERS (processes of
# make test), ARGS (for demo, pytest).

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.PHONY: demo test test-slow test-faults test-soak lint venv venv-test clean

VENV := .venv
BIN := $(VENV)/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet

# A sourced ROS is used as it is, which needs the interpreter it was built for.
PYTHON ?= $(shell for p in $(if $(ROS_DISTRO),/usr/bin/python3) python3 python3.12 python3.11 python3.10; do \
	$$p -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && echo $$p && break; done)

# "system" or "wheels": where rclpy comes from, decided when .venv is created.
ROS := $(shell cat $(VENV)/.ros 2>/dev/null || { $(PYTHON) -c 'import rclpy' 2>/dev/null && echo system; } || echo wheels)
ifeq ($(ROS),wheels)
# What a sourced ROS puts here would be found before the wheels.
unexport PYTHONPATH AMENT_PREFIX_PATH
ifdef ROS_DISTRO
unexport LD_LIBRARY_PATH RMW_IMPLEMENTATION
endif
REQUIREMENTS := requirements/robot.txt requirements/ros.txt requirements/sim.txt
else
REQUIREMENTS := requirements/robot.txt requirements/sim.txt
endif

# The build for CPUs by its full name: a plain version would pull gigabytes of CUDA libraries from the public index.
TORCH ?= torch==2.13.0$(if $(filter Linux,$(shell uname -s)),+cpu)

demo: venv
	$(BIN)/dcqfa demo $(ARGS)

# Test files go to WORKERS processes in turn; the order is kept (test/conftest.py says why). WORKERS=0: none but this one.
WORKERS ?= 2
SPREAD := $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile --no-loadscope-reorder)

test: venv-test
	$(BIN)/python -m pytest -m "not slow and not soak" $(SPREAD) $(ARGS)

# What is held to its first try: make test repeats some tests (test/repeats.py).
ONCE := --max-suite-reruns=0

test-slow: venv-test
	$(BIN)/python -m pytest -m slow --timeout=900 $(ONCE) $(ARGS)

test-faults: venv-test
	DCQFA_FAULTS=full DCQFA_FAULTS_JSON=out/faults.json $(BIN)/python -m pytest test/faults -m faults --timeout=3600 $(ONCE) $(ARGS)

SOAK_S ?= 3600
SOAK_DISCONNECTS ?= 200
test-soak: venv-test
	DCQFA_SOAK_S=$(SOAK_S) DCQFA_SOAK_DISCONNECTS=$(SOAK_DISCONNECTS) DCQFA_FAULTS_JSON=out/soak.json \
		$(BIN)/python -m pytest test/faults -m soak --timeout=14400 $(ONCE) $(ARGS)

lint: venv-test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

venv: $(STAMPS)/package $(STAMPS)/libraries

venv-test: venv $(STAMPS)/test

$(STAMPS)/created:
	@test -n "$(PYTHON)" || { echo "error: no Python 3.10 to 3.12 found; install one or run: make PYTHON=/path/to/python3"; exit 1; }
	@test "$(ROS)" = system || test "$$(uname -m)" = x86_64 || { \
		echo "error: the ROS 2 wheels exist for x86_64 only; install ROS 2 Humble or Jazzy, source its setup file, try again"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
		echo "creating $(VENV) with $(PYTHON), ROS from $(ROS)"; \
		$(PYTHON) -m venv --clear $(if $(filter system,$(ROS)),--system-site-packages) $(VENV) || { \
			rm -rf $(VENV); echo "error: on Debian and Ubuntu run: sudo apt-get install -y python3-venv"; exit 1; }; }
	@echo $(ROS) >$(VENV)/.ros
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/demo: $(STAMPS)/created requirements/robot.txt requirements/ros.txt requirements/sim.txt
	@echo "installing $(REQUIREMENTS)"
	@$(PIP) $(addprefix -r ,$(REQUIREMENTS))
	@touch $@

$(STAMPS)/package: $(STAMPS)/demo setup.py setup.cfg pyproject.toml
	@$(PIP) --no-deps --editable .
	@touch $@

# Import $(1); where a shared library is missing, which bare containers lack, install the Debian packages $(2).
define with_libraries
@if ! reason=$$($(BIN)/python -c 'import $(1)' 2>&1); then \
	install="apt-get install -y --no-install-recommends $(2)"; \
	case "$$reason" in *.so*) ;; *) echo "$$reason" >&2; exit 1;; esac; \
	if ! command -v apt-get >/dev/null; then \
		echo "error: $(1) needs shared libraries ($(2)); install them with this system's package manager"; exit 1; \
	elif test "$$(id -u)" = 0; then apt-get update -qq && DEBIAN_FRONTEND=noninteractive $$install >/dev/null; \
	elif sudo -n true 2>/dev/null; then sudo -n apt-get update -qq && sudo -n $$install >/dev/null; \
	else echo "error: $(1) needs system libraries; run: sudo $$install"; exit 1; fi; \
	$(BIN)/python -c 'import $(1)'; \
fi
endef

$(STAMPS)/libraries: $(STAMPS)/demo
	$(call with_libraries,cv2,libgl1 libglib2.0-0)
	@touch $@

$(STAMPS)/test: $(STAMPS)/demo requirements/cell.txt requirements/train.txt requirements/test.txt requirements/openvino.txt requirements/tensorrt_rtx.txt
	@echo "installing $(TORCH)"
	@$(PIP) $(TORCH) || { test "$(origin TORCH)" = file && { \
		echo "the configured indexes have no build for CPUs only: installing the default build, which may be large"; \
		$(PIP) $(firstword $(subst +, ,$(TORCH))); }; }
	@echo "installing requirements/cell.txt and requirements/test.txt"
	@$(PIP) -r requirements/cell.txt -r requirements/test.txt
	$(call with_libraries,pyrealsense2,libusb-1.0-0)
	@echo "installing requirements/openvino.txt and requirements/tensorrt_rtx.txt"
	@$(PIP) --no-deps -r requirements/openvino.txt -r requirements/tensorrt_rtx.txt
	@touch $@

clean:
	rm -rf $(VENV) build install log out dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find dcqfa_ros training test launch -name __pycache__ -type d -prune -exec rm -rf {} +
