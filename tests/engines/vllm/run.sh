#!/usr/bin/env bash
# Tests of a running vLLM, or any Python, in the environment that install.sh made.
# Usage: run.sh DIRECTORY [arguments of Python]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
venv=$(cd "$1" && pwd)
shift
cd "$root"
export PYTHONPATH=$root:$root/kernels:$root/connectors:$root/tests
# one thread an engine: several share the machine, and threads that spin would wait for each other
export OMP_NUM_THREADS=1 VLLM_CPU_OMP_THREADS_BIND=nobind VLLM_CPU_KVCACHE_SPACE=1
export VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" "$@"
fi
exec "$venv/bin/python" -m pytest tests/engines/vllm -p no:cacheprovider --durations=10
