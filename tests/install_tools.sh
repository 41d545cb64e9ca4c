#!/usr/bin/env bash
# Install what checks deploy/ by the system's packages: promtool, a headless Chromium, systemd-analyze.
# Does nothing for those that are there.
set -euo pipefail
packages=()
command -v promtool >/dev/null || packages+=(prometheus)
command -v systemd-analyze >/dev/null || packages+=(systemd)
command -v chromium-headless-shell >/dev/null || command -v chromium >/dev/null || packages+=(chromium-headless-shell)
[ ${#packages[@]} = 0 ] && exit
if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}" >/dev/null
    exit
fi
echo "the tests of deploy/ need more tools; install them with: sudo apt-get install ${packages[*]}" >&2
exit 1
