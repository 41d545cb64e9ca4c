#!/usr/bin/env bash
# Make what a first set-up needs: a small authority, certificates, tokens, the password of the shared tier.
#   deploy/make_credentials.sh DIRECTORY [NAME-OR-ADDRESS-OF-THE-SERVER ...]
# Put certificates of your organisation in their place when you have them. TQ_STORE is the command that makes
# tokens, tq-store where it is not set.
set -euo pipefail
umask 077
if [ $# -lt 1 ]; then
    sed -n '2,5s/^# //p' "$0" >&2
    exit 2
fi
directory=$1
shift
if [ -e "$directory" ]; then
    echo "$directory is there already; move it away first" >&2
    exit 1
fi
mkdir -p "$directory"
cd "$directory"

# what openssl and tq-store say is news only when they fail; then nothing half made stays behind
finish() {
    local status=$?
    [ $status -eq 0 ] && return
    cat openssl.log entry >&2 2>/dev/null || true
    echo "make_credentials.sh failed, see above; $directory is removed again" >&2
    rm -rf "$PWD"
}
trap finish EXIT

names="DNS:localhost,IP:127.0.0.1,DNS:tq-store,DNS:valkey"
for name in "$@"; do
    if [[ $name =~ ^[0-9.]+$|: ]]; then names+=",IP:$name"; else names+=",DNS:$name"; fi
done
fresh=(-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes)
openssl req -x509 "${fresh[@]}" -days 3650 -subj "/CN=tq-store authority" -keyout ca.key -out ca.pem 2>openssl.log
printf 'subjectAltName=%s\nextendedKeyUsage=serverAuth\n' "$names" >names
for server in server valkey; do
    openssl req "${fresh[@]}" -subj "/CN=tq-store $server" -keyout "$server.key" -out "$server.csr" 2>>openssl.log
    openssl x509 -req -in "$server.csr" -CA ca.pem -CAkey ca.key -CAcreateserial -days 825 -extfile names \
        -out "$server.pem" 2>>openssl.log
done
rm names ca.srl ./*.csr openssl.log

# a token for each replica, so that one can be taken back; the server keeps hashes of them only
for holder in replica-a replica-b operator; do
    ${TQ_STORE:-tq-store} token new "${holder%-?}" >"$holder.token" 2>entry
    entries+=("$(grep -oE '"[0-9a-f]{16}:[0-9a-f]{64}"' entry)")
done
rm entry
cat >tenants.toml <<END
# replicas of one tenant share their blocks; RUNBOOK.md says how to replace a token
[replicas]
tokens = [
    ${entries[0]},  # replica-a.token
    ${entries[1]},  # replica-b.token
]

[operator]
tokens = [${entries[2]}]
admin = true
END
for replica in replica-a replica-b operator; do
    cat >"$replica.toml" <<END
[client]
address = "${1:-127.0.0.1}:7437"
tls_ca = "$PWD/ca.pem"
token_file = "$PWD/$replica.token"
END
done

openssl rand -hex 32 >valkey_password
cat >valkey.acl <<END
user default off
user tq-store on >$(cat valkey_password) resetkeys ~tq:* resetchannels -@all +ping +select +info +dbsize +scan +exists +strlen +get +getex +set +unlink +rename +expire +multi +exec +asking +cluster|slots
END
openssl rand -hex 16 >grafana_password
cat >server.toml <<END
# for a server on the same machine as a Valkey on port 6380
[server]
tls_cert = "$PWD/server.pem"
tls_key = "$PWD/server.key"
tenants_file = "$PWD/tenants.toml"
redis_url = "rediss://127.0.0.1:6380"
redis_user = "tq-store"
redis_password_file = "$PWD/valkey_password"
redis_tls_ca = "$PWD/ca.pem"
END
cat >compose.env <<END
TQ_STORE_SECRETS=$PWD
TQ_STORE_USER=$(id -u):$(id -g)
END
