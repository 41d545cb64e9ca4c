#!/usr/bin/env bash
# The tests of LMCache in the environment that install.sh made.
# Usage: run.sh DIRECTORY [pytest arguments]
set -euo pipefail
root=$(cd "$(dirname "$0")/../../.." && pwd)
venv=$(cd "$1" && pwd)
shift
cd "$root"
export LMCACHE_SOURCES=$venv/lmcache-sources
export PYTHONPATH=$root:$root/kernels:$root/connectors:$root/tests
if [ $# -gt 0 ]; then
    exec "$venv/bin/python" -m pytest "$@"
fi
exec "$venv/bin/python" -m pytest tests/engines/lmcache \
    --cov --cov-config=tests/engines/lmcache/coverage.toml --cov-report=term-missing
