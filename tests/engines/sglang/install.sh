#!/usr/bin/env bash
# An environment with SGLang on a CPU.
# Usage: install.sh DIRECTORY. PYTHON, TORCH and SGLANG_VERSION may be set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=$1
version=${SGLANG_VERSION:-0.5.17}
stamp=$venv/.installed-$version
# the release of transformers that this release of SGLang registers its configurations in
case $version in
    0.5.17) transformers=5.12.1 ;;
    0.5.23) transformers=5.19.0 ;;
    *) echo "tests run on SGLang 0.5.17 and 0.5.23, not on $version" >&2; exit 2 ;;
esac

if [ -e "$stamp" ] && [ "$stamp" -nt "$here/requirements.txt" ] && [ "$stamp" -nt "$root/pyproject.toml" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "${TORCH:-torch==2.13.0}"
"${pip[@]}" install --requirement "$here/requirements.txt" "transformers==$transformers" \
    --editable "$root[server]"
"${pip[@]}" install --no-deps "sglang==$version" torchvision==0.28.0 compressed-tensors==0.18.0 xgrammar==0.2.7
rm -f "$venv"/.installed-*
touch "$stamp"
