#!/usr/bin/env bash
# The tests on SGLang, or any Python, in the environment that install.sh made.
# Usage: run.sh DIRECTORY [arguments of Python]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
venv=$(cd "$1" && pwd)
shift
cd "$root"
export PYTHONPATH=$root:$root/kernels:$root/connectors:$root/tests
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" "$@"
fi
exec "$venv/bin/python" -m pytest tests/engines/sglang \
    --cov --cov-config=tests/engines/sglang/coverage.toml --cov-report=term-missing
