.PHONY: test check format soak gpu clean

test:  ## set up what is missing and run the tests
	tools/setup.sh
	.venv/bin/python -m pytest -m "not soak" $(PYTEST_ARGS)

check:  ## lint, format and types
	tools/setup.sh
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/python -m pytest -q tests/test_architecture.py

format:
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

soak:  ## the long tests
	tools/setup.sh
	.venv/bin/python -m pytest -m soak

gpu:  ## the tests of layouts on the GPUs of this machine, over NCCL, and those of kernels; reports in build/gpu
	tools/setup.sh
	mkdir -p build/gpu && rm -f build/gpu/bounds.jsonl
	DS_ACCELERATOR=cuda BOUNDS_FILE=$(CURDIR)/build/gpu/bounds.jsonl .venv/bin/python -m pytest -m "soak or not soak" \
		--junitxml=build/gpu/cases.xml tests/distributed tests/models/test_document_kernel.py tests/inference \
		tests/benchmarks tests/profiling $(PYTEST_ARGS); \
	status=$$?; .venv/bin/python tests/bounds.py build/gpu/bounds.jsonl > build/gpu/bounds.md; exit $$status

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
