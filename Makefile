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

gpu:  ## the tests of layouts on the GPUs of this machine, over NCCL, and those of kernels
	tools/setup.sh
	DS_ACCELERATOR=cuda .venv/bin/python -m pytest -m "soak or not soak" tests/distributed tests/models/test_document_kernel.py tests/inference

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
