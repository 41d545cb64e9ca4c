#!/usr/bin/env bash
# An environment with LMCache on a CPU, and the tests of that LMCache's release.
# Usage: install.sh DIRECTORY. PYTHON, TORCH and LMCACHE_VERSION may be set.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
venv=$1
version=${LMCACHE_VERSION:-0.5.6}
stamp=$venv/.installed-$version

if [ -e "$stamp" ] && [ "$stamp" -nt "$here/requirements.txt" ] && [ "$stamp" -nt "$root/pyproject.toml" ]; then
    exit 0
fi
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "${TORCH:-torch==2.13.0}"
"${pip[@]}" install --no-deps "lmcache==$version"
"${pip[@]}" install --requirement "$here/requirements.txt" --editable "$root[server]"

# the release's sources hold its tests; pip looks at their metadata, for which they need not be built
sources=$venv/lmcache-sources
rm -rf "$sources" && mkdir "$sources"
NO_CUDA_EXT=1 SETUPTOOLS_SCM_PRETEND_VERSION=$version "${pip[@]}" download --no-deps --no-build-isolation \
    --no-binary lmcache --dest "$sources" "lmcache==$version"
tar --extract --gzip --strip-components 1 --directory "$sources" --file "$sources/lmcache-$version.tar.gz" \
    "lmcache-$version/tests"
rm "$sources/lmcache-$version.tar.gz"
touch "$stamp"
