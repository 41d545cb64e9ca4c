#!/usr/bin/env bash
# Tests against the stock wheel of vLLM, or any Python, in the environment that install.sh made.
# Usage: run.sh DIRECTORY [arguments of Python]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
venv=$(cd "$1" && pwd)
shift
cd "$root"
export PYTHONPATH=$root:$root/kernels:$root/connectors:$root/tests VLLM_NO_USAGE_STATS=1 TRITON_INTERPRET=0
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" "$@"
fi
exec "$venv/bin/python" -m pytest tests/engines/vllm_stock \
    --cov --cov-config=tests/engines/vllm_stock/coverage.toml --cov-report=term-missing
