#!/usr/bin/env bash
# Install libfaketime, which tests of jumping clocks need, by the system's packages, or say what to type.
set -euo pipefail
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends faketime >/dev/null
    exit
fi
echo "the tests of jumping clocks need libfaketime; install faketime (apt) or libfaketime (dnf, brew)" >&2
exit 1
