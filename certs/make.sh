#!/bin/sh
# Makes certificates for development in this folder: an authority (ca.crt, ca.key) and the gateway's (gateway.crt, gateway.key), for
# localhost, 127.0.0.1, ::1 and the names and addresses given. Usage: certs/make.sh [NAME|ADDRESS]...
# TIDEGATE names the program; without it the one that cargo builds is used.
set -eu
cd "$(dirname "$0")"
tidegate() {
    if [ -n "${TIDEGATE:-}" ]; then "$TIDEGATE" "$@"; else cargo run --quiet --release -- "$@"; fi
}
for name do
    set -- "$@" --host "$name"
    shift
done
[ -e ca.key ] || tidegate cert ca
tidegate cert gateway --host localhost --host 127.0.0.1 --host ::1 "$@"
