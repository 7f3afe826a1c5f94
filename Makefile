# make demo: install and generate with the bundled AWQ model.   make test: everything.   make check: lint, format, types.
PYTHON ?= python3
BIN := .venv/bin

# make architectures: the sweep behind ARCHITECTURES.md.
.PHONY: demo test test-slow architectures check format bench clean

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/relinear generate --model-path demo --quantization awq --max-new-tokens 64 --stream \
		--prompt-file runtime/bundled/prompts.jsonl

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: check
	$(BIN)/python -m pytest --durations=10

test-slow: .venv/installed
	$(BIN)/python -m pytest -m slow --durations=10

architectures: .venv/installed
	$(BIN)/python -m tests.architectures --write

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/installed
	$(BIN)/python -m benchmarks.linear
	$(BIN)/python -m benchmarks.attention
	$(BIN)/python -m benchmarks.engine

clean:
	rm -rf .venv build *.egg-info
