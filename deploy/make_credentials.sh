#!/usr/bin/env bash
# Make a small authority of your own, certificates, tokens and the settings that go with them, for a first set-up:
#   deploy/make_credentials.sh DIRECTORY [NAME-OR-ADDRESS-OF-THE-SERVER ...]
# Bring certificates of your organisation in their place when you have them.
set -euo pipefail
umask 077
[ $# -ge 1 ] || { sed -n '2,4s/^# //p' "$0" >&2; exit 2; }
directory=$1
shift
[ ! -e "$directory" ] || { echo "$directory is there already; move it away first" >&2; exit 1; }
mkdir -p "$directory"
cd "$directory"

names="DNS:localhost,IP:127.0.0.1,DNS:tq-store,DNS:valkey"
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$|: ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done
key=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=tq-store authority" -keyout ca.key -out ca.pem 2>/dev/null
for name in server valkey; do
    openssl req "${key[@]}" -subj "/CN=tq-store $name" -keyout "$name.key" -out "$name.csr" 2>/dev/null
    openssl x509 -req -in "$name.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 825 -out "$name.pem" \
        -extfile <(printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names") 2>/dev/null
    rm "$name.csr"
done

# one token a replica, so that one can be taken back
for replica in a b; do openssl rand -hex 32 >"replica-$replica.token"; done
cat replica-?.token >tokens
openssl rand -base64 18 >grafana_password
password=$(openssl rand -hex 32)
echo "user default off
user tq-store on >$password resetchannels ~tq:* -@all +@read +@write +@connection +info +dbsize -@dangerous +info" >valkey.acl
