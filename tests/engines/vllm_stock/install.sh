#!/usr/bin/env bash
# An environment with the stock wheel of vLLM on a CPU, where it can be imported and its parts be driven.
# Usage: install.sh DIRECTORY. PYTHON, TORCH and VLLM_VERSION may be set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
venv=$1
version=${VLLM_VERSION:-0.33.0}
stamp=$venv/.installed-$version

if [ -e "$stamp" ] && [ "$stamp" -nt "$here/requirements.txt" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "${TORCH:-torch==2.13.0}"
"${pip[@]}" install --no-deps --no-cache-dir "vllm==$version"
# libraries for GPUs, 700 MB, which nothing here can load
find "$venv" -path '*/site-packages/vllm/*.so' -size +1M -delete
"${pip[@]}" install --requirement "$here/requirements.txt"
touch "$stamp"
