# make quickstart   set up, then let the tiny world teach itself (conf/quickstart.yaml)
# make test         set up, then run the tests, two files at a time; TESTS="tests/search -k uct" runs some of them
# make setup        a virtual environment in .venv with the cpu extra (EXTRA=gpu: the gpu extra)
# make clean        remove .venv and caches; runs/ stays

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.ONESHELL:
.DELETE_ON_ERROR:

EXTRA ?= cpu
TESTS ?=
PYTHON ?= $(firstword $(foreach v,3.11 3.12 3.13,$(shell command -v python$(v) || true)) python3)
VENV := .venv
READY := $(VENV)/.ready-$(EXTRA)
CONSTRAINTS := constraints/$(EXTRA).txt
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
CPU_WHEELS := https://download.pytorch.org/whl/cpu
IMPORTS := torch, transformers, vllm, ray, deepspeed, datasets, math_verify, evolve

.PHONY: quickstart test setup system clean

quickstart: setup
	$(VENV)/bin/python -m evolve.driver conf=quickstart

test: setup
	$(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

setup: system $(READY)

# bwrap and libseccomp make the sandbox; libnuma is loaded by vLLM's CPU build, whose kernels g++ compiles.
system:
	@missing=()
	command -v bwrap >/dev/null || missing+=(bubblewrap)
	command -v g++ >/dev/null || missing+=(g++)
	libraries=$$(PATH=$$PATH:/sbin:/usr/sbin ldconfig -p 2>/dev/null || true)
	[[ $$libraries == *libseccomp.so.2* ]] || missing+=(libseccomp2)
	[[ $$libraries == *libnuma.so.1* ]] || missing+=(libnuma1)
	if (( $${#missing[@]} == 0 )); then exit 0; fi
	as_root=()
	if (( $$(id -u) != 0 )); then as_root=(sudo -n); fi
	if command -v apt-get >/dev/null && "$${as_root[@]}" true 2>/dev/null; then
	  echo "setup: installing system packages: $${missing[*]}"
	  install=("$${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$${missing[@]}")
	  "$${install[@]}" >/dev/null 2>&1 || { "$${as_root[@]}" apt-get update -qq && "$${install[@]}"; }
	else
	  echo "setup: system packages are missing and may not be installed from here. Run this, then make again:" >&2
	  echo "  sudo apt-get install $${missing[*]}" >&2
	  exit 1
	fi

$(READY): pyproject.toml $(CONSTRAINTS)
	@echo "setup: virtual environment in $(VENV) with $$($(PYTHON) --version) ($(EXTRA) extra; about 3 minutes, 5 GB)"
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "setup: Python 3.11 or newer is needed; name one: make PYTHON=python3.12")'
	# A CPU build of torch would satisfy the gpu extra's pin, and the other way round.
	for other in $(VENV)/.ready-*; do
	  if [[ -e $$other && $$other != $@ ]]; then
	    echo "setup: $(VENV) holds the $${other##*.ready-} extra; run make clean first" >&2
	    exit 1
	  fi
	done
	[[ -x $(VENV)/bin/python ]] || $(PYTHON) -m venv $(VENV)
	torch=$$(grep '^torch==' $(CONSTRAINTS))
	echo "setup: $$torch"
	if ! $(PIP) install -qq --constraint $(CONSTRAINTS) "$$torch"; then
	  echo "setup: pip's index has no $$torch; asking $(CPU_WHEELS)"
	  $(PIP) install -qq --retries 2 --timeout 30 --constraint $(CONSTRAINTS) --extra-index-url $(CPU_WHEELS) "$$torch"
	fi
	echo "setup: everything else, as pinned in $(CONSTRAINTS)"
	$(PIP) install -qq --constraint $(CONSTRAINTS) --editable '.[$(EXTRA),dev]'
	# Builds of these for another torch break the import of transformers and vLLM; nothing here needs them.
	for package in torchvision torchaudio torchcodec; do
	  if $(PIP) show --quiet $$package 2>/dev/null && ! $(VENV)/bin/python -c "import $$package" 2>/dev/null; then
	    echo "setup: removing $$package, which does not fit this torch"
	    $(PIP) uninstall -qq --yes $$package
	  fi
	done
	echo "setup: checking that what is installed imports"
	$(VENV)/bin/python -W ignore -c 'import $(IMPORTS)' >/dev/null
	touch $@
	echo "setup: done"

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
