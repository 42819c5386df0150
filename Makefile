# The commands of a contributor. Each target installs what it needs into .venv.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-torch lint format api bench gpu gpu-build wheel hub-kernels docs
.PHONY: clean

PYTHON ?= python3
VENV := .venv
TORCH ?= 2.11.0
ARGS ?=
RESULTS ?= bench/results

# Not "auto", so that kernels that do not compile are an error here. CUDA takes minutes to compile, so
# a machine without a GPU skips it; CI requests it.
VIDL_BUILD ?= $(if $(shell command -v $(firstword $(CXX)) c++ g++ clang++),$(if $(and $(NVCC),$(GPU)),cuda,cpu),none)
NVCC := $(shell command -v "$${CUDACXX:-nvcc}" "$${CUDA_HOME:-/usr/local/cuda}/bin/nvcc")
GPU := $(wildcard /dev/nvidia[0-9]*)

# uv does not read pip's variable, and rejects an empty value.
UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
ifneq ($(UV_FIND_LINKS),)
export UV_FIND_LINKS
endif
# Without bytecode, every process compiles torch, timm and transformers again, which takes seconds.
unexport PYTHONDONTWRITEBYTECODE

DEPS := $(VENV)/installed
READY := $(VENV)/ready-$(VIDL_BUILD)
TORCH_VENV := .venv-torch-$(TORCH)
SOURCES := CMakeLists.txt setup.py vidl/__init__.py $(wildcard csrc/*.h csrc/*/*)
# Install packages (all but the extras `peers` and `ray`), or vidl itself, into the environment $(1).
packages = $(1)/bin/uv pip install --quiet --python $(1)/bin/python -r pyproject.toml \
  $(foreach extra,all test lint release docs,--extra $(extra))
vidl = VIDL_BUILD=$(VIDL_BUILD) $(1)/bin/uv pip install --quiet --python $(1)/bin/python \
  --no-build-isolation --no-deps --reinstall-package vidl-kernels --editable .

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(READY) ## train SMAUG on real clips; show what it learns and what sparsity saves
	$(VENV)/bin/python examples/demo.py $(ARGS)

test: $(READY) ## run the tests without the long sweeps; ARGS="-k name" selects some
	$(VENV)/bin/python -m pytest -n auto --maxprocesses 8 -m "not slow" $(ARGS)

test-slow: ## run the long sweeps
	$(MAKE) test ARGS="-m slow"

test-torch: $(TORCH_VENV)/bin/uv ## run the tests with another torch: make test-torch TORCH=2.11.0
	# torch 2.11 installs Triton 3.6, whose interpreter fails with numpy 2.4 and newer.
	$(call packages,$(TORCH_VENV)) torch==$(TORCH) 'numpy<2.4'
	@rm -f $(VENV)/ready-* # the library in vidl/ will be built against this torch
	$(call vidl,$(TORCH_VENV))
	$(TORCH_VENV)/bin/python -m pytest -n auto --maxprocesses 8 -m "not slow" $(ARGS)

lint: $(DEPS) ## run ruff, mypy, clang-format and the checks of the manual, as CI does
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python -m sphinx -E -W --keep-going -q -b dummy docs build/docs
	$(VENV)/bin/clang-format --dry-run --Werror $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*.h)

format: $(DEPS) ## format the sources with ruff and clang-format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(wildcard csrc/*/*.cpp csrc/*/*.cu csrc/*/*.h csrc/*.h)

api: $(READY) ## write the public names and signatures to tests/api.txt, which a test compares
	$(VENV)/bin/python tests/api.py > tests/api.txt.new && mv tests/api.txt.new tests/api.txt

bench: $(READY) ## time every op against its baselines; ARGS="--write" keeps the results
	$(VENV)/bin/vidl bench $(ARGS)

wheel: $(DEPS) ## build a wheel and an sdist in dist; VIDL_BUILD=cuda adds the CUDA kernels
	@rm -rf dist
	VIDL_BUILD=$(VIDL_BUILD) PATH="$(abspath $(VENV)/bin):$$PATH" $(VENV)/bin/python -m build --no-isolation
	# The library is part of torch's process: what torch brings is not copied into the wheel.
	PATH="$(abspath $(VENV)/bin):$$PATH" $(VENV)/bin/auditwheel repair --exclude 'libtorch*' -w dist dist/*-linux_*.whl
	@rm dist/*-linux_*.whl
	@ls dist

# For GPUs too with VIDL_BUILD=cuda. Triton and PyTorch alone serve other machines.
hub-kernels: $(DEPS) ## pack the ops for the Hugging Face Hub in build/hub
	@rm -rf build/hub
	@for kind in none $(filter-out none,$(VIDL_BUILD:cuda=cpu cuda)); do \
	  PATH="$(abspath $(VENV)/bin):$$PATH" $(VENV)/bin/python hub/pack.py $$kind build/hub || exit 1; \
	done

docs: $(READY) ## build the manual in docs/_build/html
	$(VENV)/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "wrote docs/_build/html/index.html"

clean: ## remove build outputs, but not the environments
	rm -rf build dist demo *.egg-info docs/_build vidl/_C.so vidl/_build.json .venv*/ready-*
	rm -rf .pytest_cache .ruff_cache .mypy_cache .benchmarks

$(DEPS): pyproject.toml | $(VENV)/bin/uv
	@echo "vidl: installing into $(VENV)"
	@$(call packages,$(VENV))
	@touch $@

$(READY): $(DEPS) $(SOURCES)
	@echo "vidl: building with VIDL_BUILD=$(VIDL_BUILD)"
	@rm -f $(VENV)/ready-*
	@$(call vidl,$(VENV))
	@touch $@

# On Debian and Ubuntu, `python3 -m venv` needs a separate package.
$(VENV)/bin/uv $(TORCH_VENV)/bin/uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 10) or sys.exit( \
	  f"vidl: need Python 3.10 or newer, got {v[0]}.{v[1]}; try: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  install="apt-get update -qq && apt-get install -y python3-venv"; \
	  if ! command -v apt-get >/dev/null; then echo "vidl: $(PYTHON) has no venv module" >&2; exit 1; \
	  elif [ "$$(id -u)" = 0 ]; then sh -c "$$install"; \
	  elif sudo -n true 2>/dev/null; then sudo -n sh -c "$$install"; \
	  else echo "vidl: $(PYTHON) has no venv; run: sudo sh -c '$$install'" >&2; exit 1; fi; }
	@$(PYTHON) -m venv $(@:/bin/uv=)
	@$(@D)/python -m pip install --quiet --disable-pip-version-check uv

# For a machine with a GPU. Needs no network if torch, pytest, cmake, ninja and nvcc are installed, and
# no compiler if the library of `make gpu-build` fits.
gpu: ## build with CUDA, test, tune, benchmark and report; RESULTS=folder
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then python=$(PYTHON); \
	elif ! compgen -G '/dev/nvidia[0-9]*' >/dev/null && ! nvidia-smi -L >/dev/null 2>&1; then \
	  echo "vidl: make gpu needs an NVIDIA GPU, and this machine has none" >&2; exit 1; \
	else $(MAKE) --no-print-directory $(DEPS) && python=$(VENV)/bin/python; fi && \
	$(MAKE) --no-print-directory gpu-run GPU_PYTHON="$$python"

.PHONY: gpu-run
gpu-run:
	@$(GPU_PYTHON) -c 'import sys, torch; torch.cuda.is_available() or sys.exit( \
	  f"vidl: make gpu needs an NVIDIA GPU, and torch {torch.__version__} sees none")'
	@$(MAKE) --no-print-directory gpu-library GPU_PYTHON="$(GPU_PYTHON)"
	@$(MAKE) --no-print-directory gpu-steps GPU_PYTHON="$(GPU_PYTHON)" GPU_BEGAN=$(GPU_BEGAN)

# The library for GPUs and its key, which holds what it was built from: the sources, the version of
# torch and the architectures.
GPU_PREBUILT ?= build/gpu
GPU_CMAKE ?= build/cmake-gpu
GPU_PREFIX ?= vidl
GPU_ARCHITECTURES := $(or $(CMAKE_CUDA_ARCHITECTURES),$(CUDAARCHS),90a)
gpu_key = { cat $(sort $(SOURCES)); echo "$(GPU_ARCHITECTURES)"; \
  $(GPU_PYTHON) -c 'import torch; print(torch.__version__)'; } | sha256sum | cut -d ' ' -f 1

gpu-build: ## build the library of `make gpu` in build/gpu, on a machine with nvcc but no GPU
	@if $(PYTHON) -c 'import torch' 2>/dev/null; then python=$(PYTHON); \
	else $(MAKE) --no-print-directory $(DEPS) && python=$(VENV)/bin/python; fi && \
	$(MAKE) --no-print-directory gpu-prebuild GPU_PYTHON="$$python"

# The key is written last: an interrupted build has none.
.PHONY: gpu-prebuild gpu-library gpu-compile
gpu-prebuild:
	@mkdir -p $(GPU_PREBUILT) && rm -f $(GPU_PREBUILT)/key && key=$$($(gpu_key)) && \
	$(MAKE) --no-print-directory gpu-compile GPU_PYTHON="$(GPU_PYTHON)" \
	  GPU_PREFIX=$(GPU_PREBUILT) && \
	$(MAKE) --no-print-directory gpu-triton GPU_PYTHON="$(GPU_PYTHON)" && \
	echo "$$key" > $(GPU_PREBUILT)/key

# Triton compares its cache with the sources and its own version. It stores paths, so `gpu-steps`
# writes those of its machine; a launch does not read the empty files.
GPU_TRITON := $(abspath $(GPU_PREBUILT))/triton
.PHONY: gpu-triton
gpu-triton:
	@rm -rf $(GPU_TRITON) && mkdir -p $(GPU_TRITON)
	for module in $(patsubst %/triton_kernels.py,vidl.kernels.%.triton_kernels,$(patsubst \
	  kernels/%,%,$(wildcard kernels/*/triton_kernels.py))); do \
	  for arch in $(sort $(filter 80 90,$(patsubst 90a%,90,$(subst ;, ,$(GPU_ARCHITECTURES))))); do \
	    echo --arch=$$arch $$module; done; \
	done | PYTHONPATH=$(CURDIR) TRITON_CACHE_DIR=$(GPU_TRITON) \
	  xargs -L 1 -P "$$(nproc)" $(GPU_PYTHON) tests/test_triton_aot.py > $(GPU_TRITON)/variants
	@find $(GPU_TRITON) -type f ! -name '*.cubin' ! -name '*.json' ! -name variants \
	  -exec truncate -s 0 {} +

gpu-library:
	@if [ ! -e $(GPU_PREBUILT)/key ]; then fits=false; \
	elif [ "$$(cat $(GPU_PREBUILT)/key)" != "$$($(gpu_key))" ]; then fits=false; \
	  echo "vidl: $(GPU_PREBUILT) is of other sources, another torch or other architectures"; \
	else cp $(GPU_PREBUILT)/_C.so $(GPU_PREBUILT)/_build.json $(GPU_PREFIX) && \
	  if $(GPU_PYTHON) -c 'import sys; from vidl.kernels import library; sys.exit(library.LOAD_ERROR)'; \
	  then fits=true; echo "vidl: took the library of $(GPU_PREBUILT)"; else fits=false; fi; fi; \
	$$fits || $(MAKE) --no-print-directory gpu-compile GPU_PYTHON="$(GPU_PYTHON)"

gpu-compile: export PATH := $(PATH):$(CURDIR)/$(VENV)/bin
gpu-compile:
	@# CMake rejects a build folder of another copy of the sources.
	@grep -qs 'CMAKE_HOME_DIRECTORY:INTERNAL=$(CURDIR)$$' $(GPU_CMAKE)/CMakeCache.txt \
	  || rm -rf $(GPU_CMAKE)
	cmake -S . -B $(GPU_CMAKE) $(if $(shell command -v ninja),-G Ninja) -DVIDL_CUDA=ON \
	  -DPython3_EXECUTABLE="$$(command -v $(GPU_PYTHON))" \
	  -DCMAKE_CUDA_ARCHITECTURES="$(GPU_ARCHITECTURES)"
	cmake --build $(GPU_CMAKE) --parallel
	cmake --install $(GPU_CMAKE) --prefix $(GPU_PREFIX)

# GPU_SECONDS is divided among the steps: a smoke set of tests, then the choice of backends for the
# savings, the ops, the savings, and the other tests until the end: those beyond VIDL_TEST_UNTIL are
# skipped. Results are written as they are measured, and the choices beside them; SIGINT lets a
# command that is cut off sum up, so an interrupted run loses nothing. Later steps run even if an
# earlier one fails.
.PHONY: gpu-steps
gpu-steps: export VIDL_CACHE := $(abspath $(RESULTS))/cache
GPU_SECONDS ?= 480
GPU_BEGAN := $(or $(GPU_BEGAN),$(shell date +%s))
GPU_BACKEND ?= auto
SAVINGS := backend=$(GPU_BACKEND) --device cuda --preset base --steps 20 --budget 30 --no-tune \
  --write $(RESULTS)
gpu-steps:
	@if [ -d $(GPU_TRITON) ]; then export TRITON_CACHE_DIR=$(GPU_TRITON); \
	  find $(GPU_TRITON) -name '__grp__*.json' -exec \
	    sed -i -E 's#"/[^"]*/([^/"]+/[^/"]+")#"$(GPU_TRITON)/\1#g' {} +; fi; \
	said=""; status=0; began=$$(date -u +%Y-%m-%dT%H:%M:%S); \
	left() { echo $$(( $(GPU_BEGAN) + $(GPU_SECONDS) - $$(date +%s) - $$1 )); }; \
	least() { echo $$(( $$1 < $$2 ? $$1 : $$2 )); }; \
	step() { \
	  local name="$$1" seconds="$$2" result=passed code=0; shift 2; \
	  echo "==> $$name, at most $$seconds s: $$*"; \
	  if [ "$$seconds" -le 0 ]; then result="no time left"; \
	  else \
	    VIDL_TEST_UNTIL=$$(( $$(date +%s) + seconds * 9 / 10 )) \
	      timeout -s INT -k 10 "$$seconds" "$$@" || code=$$?; \
	    case $$code in 0) ;; 124|137) result="cut off after $$seconds s";; *) result=failed;; esac; \
	  fi; \
	  [ "$$result" = passed ] || status=1; said+="  $$name: $$result"$$'\n'; }; \
	vidl="$(GPU_PYTHON) -m vidl"; \
	tests="$(GPU_PYTHON) -m pytest -r fEs $(GPU_WORKERS) $(ARGS)"; \
	step "smoke tests" $$(least 90 $$(left 200)) $$tests -m gpu_smoke $(OP_TESTS); \
	for model in smaug mac; do \
	  step "tuning of $${model^^}" $$(least 45 $$(left 200)) $$vidl tune $$model --device cuda \
	    --budget $$(least 30 $$(left 215)); \
	done; \
	step "ops" $$(left 180) $$vidl bench --device cuda --budget $$(left 210) --write $(RESULTS); \
	step "savings of SMAUG" $$(least 60 $$(left 115)) $$vidl savings smaug $(SAVINGS); \
	step "savings of MAC" $$(least 60 $$(left 55)) $$vidl savings mac $(SAVINGS); \
	step "other GPU tests" $$(left 5) $$tests -m 'gpu and not gpu_smoke'; \
	$$vidl bench summary $(RESULTS) --device cuda --since $$began || status=1; \
	echo; printf '%s' "$$said"; exit $$status

OP_TESTS := $(patsubst kernels/%/op.py,tests/test_%.py,$(wildcard kernels/*/op.py))
# Triton compiles for seconds a test: several processes compile at once, if pytest-xdist is there.
GPU_WORKERS ?= $(shell $(GPU_PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null)
