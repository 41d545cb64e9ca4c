#!/usr/bin/env bash
# Install a Redis server by the system's packages, or say what to type.
set -euo pipefail
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends redis-server >/dev/null
    exit
fi
if command -v apt-get >/dev/null; then
    line="sudo apt-get install redis-server"
elif command -v dnf >/dev/null; then
    line="sudo dnf install valkey"
elif command -v brew >/dev/null; then
    line="brew install valkey"
else
    line="(your package manager's install command for redis-server or valkey-server)"
fi
echo "the tests need a real Redis or Valkey server and found none; install one with: $line" >&2
exit 1
