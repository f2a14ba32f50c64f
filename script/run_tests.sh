#!/usr/bin/env bash
# Install what is missing, then run the linter and all tests:  bash script/run_tests.sh [any argument of pytest]
source "$(dirname "$0")/common.sh"
find_python requirements-dev.txt pytest ruff safetensors onnx onnxscript onnxruntime
"$PYTHON" -m ruff check .
"$PYTHON" -m pytest "$@"
