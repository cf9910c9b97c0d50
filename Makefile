.PHONY: test check format soak clean

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

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
