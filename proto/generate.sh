#!/bin/sh
# Generate tq_store/rpc/v1 from the .proto files; with --check, fail if what is committed differs.
#
# The generator is pinned to the oldest release we support: generated modules refuse a protobuf or grpcio
# older than their generator, and inside an engine's process those versions are not ours to choose.
set -eu
cd "$(dirname "$0")/.."

generator="grpcio-tools==1.67.1"
venv=.venv-proto
if ! "$venv/bin/python" -c "from importlib.metadata import version as v; exit('grpcio-tools==' + v('grpcio-tools') != '$generator')" 2>/dev/null; then
    python3 -m venv --clear "$venv"
    "$venv/bin/pip" install --quiet "$generator"
fi

generate() { # into the directory $1
    "$venv/bin/python" -m grpc_tools.protoc -Iproto --python_out="$1" --pyi_out="$1" --grpc_python_out="$1" \
        proto/tq_store/rpc/v1/*.proto
}

case "${1-}" in
--check)
    fresh=$(mktemp -d)
    trap 'rm -rf "$fresh"' EXIT
    generate "$fresh"
    for file in "$fresh"/tq_store/rpc/v1/*; do
        diff -u "tq_store/rpc/v1/$(basename "$file")" "$file" || stale=1
    done
    if [ "${stale-0}" = 1 ]; then
        echo "tq_store/rpc/v1 is not what proto/ generates: run proto/generate.sh and commit the result" >&2
        exit 1
    fi
    ;;
"") generate . ;;
*)
    echo "usage: proto/generate.sh [--check]" >&2
    exit 2
    ;;
esac
