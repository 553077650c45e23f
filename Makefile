# The commands of this project. `make demo` and `make test` need nothing but Python >= 3.11 on Linux.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# DALI for the machine's NVIDIA driver: CUDA 13 wants 580 or newer; without a GPU either decodes on the CPU.
DRIVER := $(shell nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -1 | cut -d. -f1)
DALI := $(if $(DRIVER),$(if $(filter 1,$(shell expr $(DRIVER) \>= 580)),dali-cu13,dali-cu12),dali-cu13)
INSTALLED := $(VENV)/installed
# One worker more than cores, since they often wait for child processes; at most 4, as those use the cores too.
PYTEST := $(BIN)/python -m pytest -n $$(($$(nproc) + 1)) --maxprocesses 4 --dist worksteal

.PHONY: setup demo evidence ablations cluster test test-all bench bench-gpu lint format clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; say which: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install -c constraints.txt -e '.[$(DALI),dev]'
	touch $@

demo: setup
	$(BIN)/python launch/demo.py demo

# What docs/evidence.md reports: under an hour on two idle cores, and its second table half an hour more.
evidence: setup
	$(BIN)/python launch/evidence.py evidence

ablations: setup
	$(BIN)/python launch/evidence.py evidence --ablations

# SLURM for the tests marked slurm; where it cannot be installed they are skipped and say so.
cluster:
	@sh tests/slurm/install.sh

test: setup cluster
	$(PYTEST)
	$(if $(DRIVER),$(BIN)/python -m pytest -m gpu)

test-all: setup cluster
	$(PYTEST) -m ""
	$(if $(DRIVER),$(BIN)/python -m pytest -m gpu)

# The CPU table of BENCHMARKS.md, sized for under ten minutes on two idle cores; each command's own output is in bench/.
BENCH := $(BIN)/python launch/benchmark.py

bench: setup
	$(BIN)/python launch/photographs.py bench/photographs
	$(BENCH) train model=base train.micro_batch=4 precision=fp32 --against reference --profile --warmup 1 > bench/train.log
	$(BENCH) attention model=base precision=fp32 --repeats 15 > bench/attention.log
	$(BENCH) loader data.root=bench/photographs --repeats 3 --warmup 1 > bench/loader.log
	$(BENCH) checkpoint model=base precision=fp32 --repeats 3 --warmup 1 > bench/checkpoint.log
	$(BENCH) convert model=base precision=fp32 --repeats 3 --warmup 1 > bench/convert.log
	@grep -hE '^\| (command|---) ' bench/train.log
	@grep -h '^| `python ' bench/train.log bench/attention.log bench/loader.log bench/checkpoint.log bench/convert.log

# The rows of one GPU, in about half an hour; each command's own output is in bench/gpu_*.log.
FAST := compile=true activation_checkpointing=selective
IMAGES := data.root=bench/large data.index_dir=bench/index

bench-gpu: setup
	$(BIN)/python launch/photographs.py bench/large --count 4000 --size 320 400
	$(BENCH) train model=base $(FAST) train.micro_batch=256 --against reference --profile > bench/gpu_against.log
	$(BENCH) train model=base $(FAST) train.micro_batch=512 > bench/gpu_base.log
	$(BENCH) train model=base compile=true train.micro_batch=128 > bench/gpu_recipe.log
	$(BENCH) train model=base $(FAST) train.micro_batch=512 $(IMAGES) > bench/gpu_images.log
	$(BENCH) train model=large $(FAST) train.micro_batch=256 > bench/gpu_large.log
	$(BENCH) train model=huge $(FAST) train.micro_batch=128 > bench/gpu_huge.log
	$(BENCH) attention model=base precision=bf16 train.micro_batch=128 --repeats 15 > bench/gpu_attention.log
	$(BENCH) loader $(IMAGES) train.micro_batch=128 > bench/gpu_loader.log
	$(BENCH) checkpoint model=base > bench/gpu_checkpoint.log
	$(BENCH) train model=base activation_checkpointing=selective --find-micro-batch --against reference > bench/gpu_largest.log
	@grep -hE '^\| (command|---) ' bench/gpu_base.log
	@grep -h '^| `python ' bench/gpu_*.log

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) demo evidence bench build *.egg-info .pytest_cache .mypy_cache .ruff_cache
