# `make demo` and `make test` need only this file, make and Python 3.11 or 3.12: they set up .venv themselves.
#
#   PYTHON=python3.12   which Python the environment is made with (default: the first suitable one)
#   OCTO_CPU=1          stay on the CPU although there is an NVIDIA GPU
#   ARGS="--fresh"      passed on to the demo or to pytest
#   WORKERS=4           test processes (default: the number of cores, between 2 and 8)

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup test test-all test-processes test-faults mutate aot test-aot test-docs test-lerobot test-openpi test-hub test-package soak test-sim demo docs lint lock doctor clean

VENV := .venv
PY := $(VENV)/bin/python
LOCK := requirements/cpu.lock
# The TPU compiler that belongs to the locked JAX.
LIBTPU := 0.0.42.1
SUITABLE := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 13))
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python; do \
	if $$p -c '$(SUITABLE)' 2>/dev/null; then echo $$p; break; fi; done)
UV := $(shell command -v uv 2>/dev/null)
WORKERS ?= $(shell n=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2); echo $$((n < 2 ? 2 : n > 8 ? 8 : n)))

# The stamp's name holds a checksum of what the environment is made from: a new lock makes a new stamp.
READY := $(VENV)/.ready-$(shell cat $(LOCK) setup.py | cksum | cut -d' ' -f1)

# On a machine with an NVIDIA GPU the demo also gets JAX's CUDA plugin, for the CUDA that the driver offers.
ifeq ($(OCTO_CPU),)
CUDA := $(shell nvidia-smi -L >/dev/null 2>&1 && { nvidia-smi | sed -n 's/.*CUDA[^:]*Version: *\([0-9]*\)\..*/\1/p'; echo 12; } | head -n 1)
endif
ifneq ($(CUDA),)
CUDA_EXTRA := cuda$(shell [ $(CUDA) -ge 13 ] && echo 13 || echo 12)
CUDA_READY := $(READY)-$(CUDA_EXTRA)
endif

ifeq ($(UV),)
INSTALL := $(PY) -m pip install --disable-pip-version-check
else
# Compiled once here, as pip does: where PYTHONDONTWRITEBYTECODE is set, every import of TensorFlow would compile it anew.
INSTALL := $(UV) pip install --compile-bytecode --python $(PY)
endif

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## makes .venv from the lock, with the package installed for editing

$(READY):
	@[ -n "$(PYTHON)" ] || { echo "octo_like needs Python 3.11 or 3.12 and none was found. Install one, or pass PYTHON=/path/to/python3.11." >&2; exit 1; }
	@$(PYTHON) -c '$(SUITABLE)' || { echo "PYTHON=$(PYTHON) is $$($(PYTHON) --version 2>/dev/null || echo missing); octo_like needs Python 3.11 or 3.12." >&2; exit 1; }
	@echo "Setting up $(VENV) with $$($(PYTHON) --version) and $(if $(UV),uv,pip); the first time this downloads about 500 MB."
ifeq ($(UV),)
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt install python3-venv. Or install uv." >&2; exit 1; }
else
	@[ -x $(PY) ] || $(UV) venv --quiet --python "$$(command -v $(PYTHON))" $(VENV)
endif
	@$(INSTALL) -r $(LOCK)
	@$(INSTALL) --no-deps --editable .
	@rm -f $(VENV)/.ready-* && touch $@

ifneq ($(CUDA),)
$(CUDA_READY): $(READY)
	@echo "Found an NVIDIA GPU: installing JAX's CUDA $(CUDA_EXTRA:cuda%=%) plugin (OCTO_CPU=1 prevents it)."
	@$(INSTALL) "jax[$(CUDA_EXTRA)]==$$($(PY) -c 'import jax; print(jax.__version__)')"
	@touch $@
endif

test: $(READY) ## the test suite without what is marked slow, sim or multiprocess
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "not slow and not sim and not multiprocess" $(ARGS)

test-all: $(READY) ## the whole test suite
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(ARGS)

test-processes: $(READY) ## runs of several processes, signals, bad batches, stalls (tests/multiprocess without what is slow)
	@$(PY) -m pytest -v tests/multiprocess -m "not slow" $(ARGS)

test-faults: $(READY) ## all of tests/multiprocess: also random kills, moves to other topologies, every read of a storage failing in turn
	@$(PY) -m pytest -v tests/multiprocess $(ARGS)

mutate: $(READY) ## changes the code in small ways and counts how often the tests notice (docs/testing.md)
	@$(PY) scripts/mutate.py --jobs $(WORKERS) $(ARGS)

# Beside the environment, not in it: with libtpu installed every start of JAX would look for a TPU.
AOT := $(VENV)/aot
AOT_READY := $(AOT)/.ready-$(LIBTPU)

aot: $(AOT_READY) ## the TPU compiler, put beside the environment (a download of 200 MB)

$(AOT_READY): $(READY)
	@rm -rf $(AOT)
	@$(INSTALL) --quiet --no-deps --target $(AOT) libtpu==$(LIBTPU)
	@touch $@

test-aot: $(AOT_READY) ## compiles for TPU topologies that are not here
	@PYTHONPATH=$(CURDIR)/$(AOT) JAX_PLATFORMS=cpu $(PY) -m pytest -n 2 -m aot tests/aot tests/model/test_attention.py $(ARGS)

test-docs: $(READY) ## runs the commands of the pages as they stand, in fresh clones, with fewer steps
	@$(PY) -m pytest -v tests/launch/test_docs.py $(ARGS)

test-lerobot: $(READY) ## converts datasets that the real lerobot writes (installs it in .venv-lerobot, about 8 GB)
	@[ -x .venv-lerobot/bin/python ] || $(PYTHON) -m venv .venv-lerobot
	@.venv-lerobot/bin/python -c "import lerobot" 2>/dev/null || .venv-lerobot/bin/pip install --quiet lerobot==0.4.4
	@OCTO_LEROBOT_PYTHON=$(CURDIR)/.venv-lerobot/bin/python $(PY) -m pytest tests/data/test_convert_lerobot.py $(ARGS)

OPENPI := .venv-openpi
OPENPI_READY := $(OPENPI)/.ready-0.1.2

$(OPENPI_READY): $(READY)
	@$(PYTHON) -m venv --clear $(OPENPI)
	@$(OPENPI)/bin/pip install --quiet --disable-pip-version-check openpi-client==0.1.2 typing_extensions
	@touch $@

test-openpi: $(OPENPI_READY) ## openpi's published client drives our server (in an environment of its own)
	@OCTO_OPENPI_PYTHON=$(CURDIR)/$(OPENPI)/bin/python $(PY) -m pytest tests/robot/test_openpi.py $(ARGS)

test-package: $(READY) ## builds wheels and source distributions, installs them in bare environments, acts, serves, drives
	@$(PY) -m pytest -v tests/package $(ARGS)

# Beside the environment too: the core does not need the Hub.
HUB := $(VENV)/hub
HUB_READY := $(HUB)/.ready

$(HUB_READY): $(READY)
	@rm -rf $(HUB)
	@$(INSTALL) --quiet --target $(HUB) "huggingface_hub>=1"
	@touch $@

test-hub: $(HUB_READY) ## pushes policies to a local server of the Hub's protocol and pulls them (installs huggingface_hub beside the environment)
	@PYTHONPATH=$(CURDIR)/$(HUB) $(PY) -m pytest tests/model/test_loading.py -k hugging_face $(ARGS)

CHECKPOINT ?= runs/demo/pretrain/export

soak: $(READY) ## 20 robots and worse clients on one server for 5 minutes (CHECKPOINT=, default: the demo's policy)
	@$(PY) scripts/bench_serving.py soak --checkpoint $(CHECKPOINT) $(ARGS)

SIM_READY := $(READY)-sim

$(SIM_READY): $(READY)
	@$(INSTALL) --editable ".[sim]" --constraint $(LOCK)
	@touch $@

test-sim: $(SIM_READY) ## the tests of the simulators; installs the extra `sim` into .venv
	@$(PY) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder -m "sim and not slow" $(ARGS)

demo: $(READY) $(CUDA_READY) ## data, pretraining, adaptation, evaluation, report (runs/demo/report.html)
	@$(if $(OCTO_CPU),JAX_PLATFORMS=cpu )$(PY) scripts/demo.py $(ARGS)

DOCS := .venv-docs
DOCS_LOCK := requirements/docs.lock
DOCS_READY := $(DOCS)/.ready-$(shell cksum < $(DOCS_LOCK) | cut -d' ' -f1)

$(DOCS_READY):
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/pip install --quiet --disable-pip-version-check -r $(DOCS_LOCK)
	@touch $@

docs: $(DOCS_READY) ## the docs as a site, build/site/index.html; a warning is an error (ARGS=serve: at localhost:8000)
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/mkdocs $(if $(ARGS),$(ARGS),build --strict --quiet)

lint: $(READY) ## ruff, mypy and shellcheck
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check --quiet .
	@$(PY) -m mypy
	@$(VENV)/bin/shellcheck scripts/*.sh .ci/run

doctor: $(READY) ## checks this machine: versions, storage, devices, collectives, a training step, the loader
	@$(PY) scripts/doctor.py $(ARGS)

lock: ## renews the lock from setup.py (needs uv)
	@$(UV) pip compile setup.py --extra data --extra demos --extra serve --extra notebook --extra dev --upgrade --quiet \
		--python-version 3.11 --universal --fork-strategy fewest --no-annotate --no-header --output-file $(LOCK).tmp
	@{ echo "# Exact versions of the CPU set-up: the core and the extras data, demos, serve, notebook, dev. Renewed by \`make lock\`."; \
		cat $(LOCK).tmp; } > $(LOCK) && rm $(LOCK).tmp
	@{ echo "# Exact versions of what \`make docs\` needs: the extra docs. Renewed by \`make lock\`."; \
		$(PY) -c 'import runpy, setuptools; setuptools.setup = lambda **k: print(*k["extras_require"]["docs"], sep="\n"); runpy.run_path("setup.py")' \
		| $(UV) pip compile - --upgrade --quiet --python-version 3.11 --universal --no-annotate --no-header; } > $(DOCS_LOCK)

clean: ## removes the environment and caches; runs/ stays
	@rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
