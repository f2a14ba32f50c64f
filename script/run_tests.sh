#!/usr/bin/env bash
# Install missing packages, and then run the linter and all tests.
#   bash script/run_tests.sh [any argument of pytest; paths are relative to the checkout]
source "$(dirname "$0")/common.sh"
find_python requirements-dev.txt pytest xdist ruff safetensors onnx onnxscript onnxruntime
[[ "$PYTHON" != */* ]] || PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON")
cd "$root"
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest -n auto --maxprocesses 4 --dist loadfile "$@" # one process per core, one file at a time
