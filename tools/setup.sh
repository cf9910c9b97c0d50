#!/usr/bin/env bash
# Make .venv with the pinned packages and the project in editable mode; does nothing where that is done already.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stamp=.venv/.installed
wanted=$(cat setup.py constraints.txt | cksum)
if [ "$(cat $stamp 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi
if [ -L .venv ]; then # of another checkout, whose commands would from now on be those of this one
  echo "warning: $(readlink .venv) has the packages of another version of setup.py or constraints.txt" >&2 || true
  exit 0
fi
python=${PYTHON:-python3}
if ! $python -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "error: $python is $($python --version 2>&1), Python 3.11 or newer is wanted
    try: PYTHON=python3.12 $0" >&2
  exit 2
fi
echo "setting up .venv (some minutes the first time)"
[ -x .venv/bin/python ] || $python -m venv .venv
# torch first: DeepSpeed's own build step looks for it.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch setuptools wheel
DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
  --no-build-isolation --editable '.[test]'
echo "$wanted" >$stamp
