# make train: install into .venv and run the main job. make test: the tests. Everything else is one command away: see README.md.
PYTHON ?= python3
PIP = .venv/bin/pip --disable-pip-version-check install --quiet

.PHONY: train test test-slow lint clean
train: .venv/.run
	.venv/bin/python train.py $(ARGS)

# one thread a worker: two workers on two cores are faster than one with two threads
test: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

test-slow: .venv/.dev
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow -n 2 --dist loadfile $(ARGS)

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

clean:
	rm -rf .venv build *.egg-info .pytest_cache .mypy_cache .ruff_cache
