# Two commands matter: `make demo` and `make test`. Both start from a machine with only Python 3.11, git and make.
# PYTHON=... chooses the interpreter, PYTEST_ARGS=... is handed to pytest.

VENV := .venv
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
INPUTS := pyproject.toml constraints.txt scripts/setup.sh
SETUP := bash scripts/setup.sh

unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help env demo test test-slurm check format pictures constraints clean

help:
	@echo "make demo         finetune the embedded model on made-up images and compare before with after (about 4 minutes)"
	@echo "make test         environment, Debian's libraries and Chromium, then the whole test suite"
	@echo "make test-slurm   install SLURM on this Debian (needs root or sudo) and run the tests that use it"
	@echo "make check        ruff, mypy and the docstring check"
	@echo "make format       let ruff rewrite the layout"
	@echo "make pictures     make the pictures and tables in docs/ anew"
	@echo "make constraints  renew constraints.txt"
	@echo "make clean        remove environments, caches and build outputs"

env: $(READY)

$(READY): $(INPUTS)
	@$(SETUP) env test
	@touch $@

$(READY_DEV): $(READY)
	@$(SETUP) env test,dev
	@touch $@

demo: $(READY)
	$(VENV)/bin/resfinetune demo

test: $(READY)
	@$(SETUP) libraries
	@# In the order of their names: else files of few tests come last, and those are the long ones.
	$(VENV)/bin/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

test-slurm: $(READY)
	@$(SETUP) slurm
	$(VENV)/bin/python -m pytest -m slurm $(PYTEST_ARGS)

check: $(READY_DEV)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/numpydoc lint $$(find src -name '*.py')

format: $(READY_DEV)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

pictures: $(READY)
	$(VENV)/bin/python scripts/config_docs.py
	$(VENV)/bin/python scripts/synthetic_gallery.py
	$(VENV)/bin/resfinetune demo --output build/demo
	cp build/demo/before-after.png docs/images/demo.png

constraints:
	@$(SETUP) constraints

clean:
	rm -rf $(VENV) .venv-tools build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
