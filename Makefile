# Two commands for a machine that has Python 3.11 and pip:
#
#   make demo   install into .venv, make a synthetic dataset, train on it, evaluate, draw
#   make test   install into .venv, run lint and the whole test suite
#   make gpu-report   what a GPU makes of it: tests, kernels, whole models
#   make test-rounding   the tests of numbers on other instructions, threads and seeds
#   make test-upstream   Detectron2's own tests with libra_d2's classes
#   make test-versions   other versions of Python, PyTorch, NumPy and Detectron2
#   make mutants   whether the tests notice small bugs (docs/contributing.md)
#
# Both install once. An interrupted `make demo` resumes; a finished one trains again.

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= configs/Demo/libra_faster_rcnn_R_18_FPN.yaml
OUTPUT ?= output/$(basename $(notdir $(CONFIG)))
DATA ?= datasets/synthetic
CLASSES := --classes square triangle circle
# A Fast R-CNN needs the proposals of an RPN, which is trained first.
RPN_CONFIG ?= configs/Demo/rpn_R_18_FPN.yaml
RPN_OUTPUT ?= output/$(basename $(notdir $(RPN_CONFIG)))
PROPOSALS := $(if $(findstring fast_rcnn,$(CONFIG)),$(RPN_OUTPUT)/proposals/own_val.pkl)

DATA_ARGS := --train-json $(DATA)/train/instances.json --train-images $(DATA)/train/images \
  --val-json $(DATA)/val/instances.json --val-images $(DATA)/val/images

PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
export PIP_CONSTRAINT := $(CURDIR)/requirements/constraints.txt
# pkg_resources and torch.jit announce their end each time Detectron2 is imported.
export PYTHONWARNINGS := ignore::UserWarning:detectron2.model_zoo.model_zoo,$\
  ignore::FutureWarning:torch.jit._script

.PHONY: demo test test-rounding test-upstream test-versions mutants gpu-report lint clean

demo: $(VENV)/.installed $(DATA)/train/instances.json $(DATA)/val/instances.json $(PROPOSALS)
	@if [ -f $(OUTPUT)/.finished ]; then \
	  echo "$(OUTPUT) holds a finished run: training again from the start."; rm -rf $(OUTPUT); fi
	$(PY) train_net.py --config-file $(CONFIG) --resume $(DATA_ARGS) \
	  $(if $(PROPOSALS),--train-proposals $(RPN_OUTPUT)/proposals/own_train.pkl) \
	  $(if $(PROPOSALS),--val-proposals $(RPN_OUTPUT)/proposals/own_val.pkl) \
	  OUTPUT_DIR $(OUTPUT)
	@touch $(OUTPUT)/.finished

$(RPN_OUTPUT)/proposals/own_val.pkl: $(VENV)/.installed \
    $(DATA)/train/instances.json $(DATA)/val/instances.json
	$(PY) train_net.py --config-file $(RPN_CONFIG) --resume $(DATA_ARGS) OUTPUT_DIR $(RPN_OUTPUT)
	$(PY) tools/dump_proposals.py --config-file $(RPN_CONFIG) $(DATA_ARGS) \
	  MODEL.WEIGHTS $(RPN_OUTPUT)/model_final.pth OUTPUT_DIR $(RPN_OUTPUT)

$(DATA)/train/instances.json: tools/make_synthetic_dataset.py | $(VENV)/.installed
	$(PY) -m libra_d2.tools.make_synthetic_dataset $(@D) --num-images 400 $(CLASSES) --seed 1

$(DATA)/val/instances.json: tools/make_synthetic_dataset.py | $(VENV)/.installed
	$(PY) -m libra_d2.tools.make_synthetic_dataset $(@D) --num-images 100 $(CLASSES) --seed 2

# Three processes of one thread for two cores: some tests wait for programs that they start.
test: lint
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 3 --dist worksteal

# All that can be said about a GPU only, into output/gpu: each line takes less than ten minutes.
# `make gpu-report DEVICE=cpu SIZES="--seconds 0.1 --p4-size 4 6 --image-size 64 96"` tries it.
DEVICE ?= cuda
SIZES ?=
REPORT ?= output/gpu
BENCHMARK = PYTHONPATH=tests/reference $(PY) tools/benchmark.py --device $(DEVICE) $(SIZES)

gpu-report: $(VENV)/.installed-test
	mkdir -p $(REPORT)
	$(PY) -m pytest --gpu tests/test_devices.py | tee $(REPORT)/tests.txt
	$(BENCHMARK) --only attention | tee $(REPORT)/attention.txt
	$(BENCHMARK) --only non-local pyramid sampling loss | tee $(REPORT)/parts.txt
	$(BENCHMARK) --only models --precision float32 float16 bfloat16 \
	  --num-images 4 --profile $(REPORT)/profile.txt | tee $(REPORT)/models.txt
	$(BENCHMARK) --only levers --num-images 4 | tee $(REPORT)/levers.txt
	$(BENCHMARK) --only growth --plot $(REPORT)/growth.png | tee $(REPORT)/growth.txt
	@echo "On BCCD: docs/results/bccd.md has the command; configs/BCCD/libra_faster_rcnn_R_50_FPN.yaml"

# The tests of numbers once more, on other instructions, threads and seeds: nothing may pass by the
# rounding of one machine.
test-rounding: $(VENV)/.installed-test
	ATEN_CPU_CAPABILITY=default MKL_ENABLE_INSTRUCTIONS=SSE4_2 OMP_NUM_THREADS=2 \
	  $(PY) -m pytest --seed 1 -m rounding

# DETECTRON2 is a clone: of the tag v0.6, unless $(VENV) has another Detectron2. Ten minutes.
test-upstream: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(PY) tests/reference/run_upstream_tests.py $(DETECTRON2)

# DETECTRON2 is a clone of its main branch, to test with that, too. Some gigabytes are downloaded.
test-versions:
	$(PYTHON) tests/reference/run_versions.py $(if $(DETECTRON2),--detectron2 $(DETECTRON2))

# Less than 40 minutes on two idle cores. ONLY is a folder or a module.
SEED ?= 0
MUTANTS ?= 64
ONLY ?= libra_d2

mutants: $(VENV)/.installed-mutants
	$(PY) tools/mutants.py --seed $(SEED) --mutants $(MUTANTS) --only $(ONLY)

lint: $(VENV)/.installed-test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

$(VENV)/.installed: requirements/build.txt requirements/constraints.txt \
    tools/install_detectron2.py setup.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: the pinned requirements need Python 3.11 or later; try: make PYTHON=python3.11"; \
	  exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -r requirements/build.txt
	$(PY) tools/install_detectron2.py
	$(PIP) install --no-build-isolation -e '.[opencv,evaluation]'
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements/test.txt requirements/reference.txt
	$(PIP) install -r requirements/test.txt
	$(PIP) install --no-deps -r requirements/reference.txt
	@touch $@

$(VENV)/.installed-mutants: $(VENV)/.installed-test requirements/mutants.txt
	$(PIP) install -r requirements/mutants.txt
	@touch $@

clean:
	rm -rf $(VENV) output datasets/synthetic build *.egg-info
