# make demo: install and generate with the bundled AWQ model.   make test: everything.   make check: lint, format, types.
# make accuracy: what every method loses, and the fidelity of every kernel.   make architectures: the sweep behind ARCHITECTURES.md.
# make soak: load, aborts and kills against a server, ten minutes.
PYTHON ?= python3
BIN := .venv/bin

MINUTES ?= 10

.PHONY: demo test soak accuracy test-slow test-cuda architectures mutants check format bench clean

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

# One process a core, one thread in each: tiny models gain nothing from threads, and threads of two processes wait for each other.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --durations=10

test: check
	$(PYTEST)

soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.soak --minutes $(MINUTES)

accuracy: .venv/installed
	$(BIN)/python -m tests.accuracy

test-slow: .venv/installed
	$(PYTEST) -m slow

test-cuda: .venv/installed
	$(BIN)/python -m pytest -m cuda tests/runtime/test_cuda.py tests/runtime/test_cuda_formats.py tests/runtime/test_cuda_models.py tests/runtime/test_cuda_experts.py tests/attention/paged_suite.py tests/quant/gpu_suite.py tests/runtime/operators_suite.py --durations=10

architectures: .venv/installed
	$(BIN)/python -m tests.architectures --write

mutants: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.mutants --write

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# PYTHONS="vllm=/path/to/bin/python llama_cpp=..." names environments that have the other peers.
bench: .venv/installed
	$(BIN)/python -m benchmarks.report $(if $(PYTHONS),--python $(PYTHONS))

clean:
	rm -rf .venv build *.egg-info
