#!/usr/bin/env bash
# Install what is missing, then run the linter and all tests.
#   bash script/run_tests.sh [any argument of pytest, with paths relative to the checkout]
source "$(dirname "$0")/common.sh"
find_python requirements-dev.txt pytest xdist ruff safetensors onnx onnxscript onnxruntime
[[ "$PYTHON" != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
cd "$root"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@" # one process per core, one file at a time
