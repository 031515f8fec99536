#!/bin/bash
# Everything that must hold, one function a gate, in the order in which a failure is cheapest.
#
#   ./ci.sh                  all gates
#   ./ci.sh GATE...          some: fmt lint unit integration interop docs deny arm fuzz demo bench-smoke
#   ./ci.sh --list           their names, each with what it does
#
# A machine needs a Rust toolchain and a C compiler. What else a gate needs it installs when it is missing and it may
# (Debian's packages as root, PyPI into target/venv, npm into target/npm, crates.io into target/tools); otherwise it names what is missing and
# fails. Every gate runs even after another failed. The last line is `N passed, N failed`, in gates; the exit code agrees.
#
#   FUZZ_SECONDS=8      per fuzz target            BENCH_SECONDS=1     per measurement of bench-smoke
#   ARM_TARGETS="..."   see cross/setup.sh         CI_GATE_MINUTES=40  after which a gate has failed
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
repo=$PWD
target=${CARGO_TARGET_DIR:-$repo/target}
[ "${target#/}" != "$target" ] || target=$repo/$target
export CARGO_TARGET_DIR=$target CARGO_TERM_COLOR=${CARGO_TERM_COLOR:-never} CARGO_TERM_PROGRESS_WHEN=never
state=$target/ci
host=$(rustc -vV | sed -n 's/^host: //p')

say() { echo "ci: $*"; }
fail() { echo "ci: $*" >&2; exit 1; }
# A check that could not be made is never silent: it is repeated under the timing table.
note() { say "NOT CHECKED: $*"; echo "$*" >>"$state/notes"; }

# need_debian COMMAND:PACKAGE... installs the packages whose command is missing.
need_debian() {
  local missing=() pair
  for pair in "$@"; do command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}"); done
  [ ${#missing[@]} -gt 0 ] || return 0
  command -v apt-get >/dev/null || fail "missing: ${missing[*]} (names of Debian packages; there is no apt-get here)"
  [ "$(id -u)" = 0 ] || fail "missing: run  sudo apt-get install ${missing[*]}"
  say "installing ${missing[*]}"
  apt_get update || say "apt-get update failed; trying with the lists at hand"
  # A broker or a proxy that starts by itself would take the ports that a person expects to be free.
  DEBIAN_FRONTEND=noninteractive RUNLEVEL=1 apt_get install -y --no-install-recommends "${missing[@]}" >/dev/null
}
apt_get() { apt-get -qq -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root "$@"; }

# python_venv makes target/venv with the real clients that come from PyPI.
python_venv() {
  local wanted=$repo/tests/interop/requirements.txt venv=$target/venv
  need_debian python3:python3
  if ! cmp -s "$wanted" "$venv/installed.txt"; then
    rm -rf "$venv"
    python3 -m venv "$venv" || { need_debian ensurepip-is-missing:python3-venv; python3 -m venv "$venv"; }
    "$venv/bin/pip" install -q --disable-pip-version-check -r "$wanted"
    cp "$wanted" "$venv/installed.txt"
  fi
  export TIDEGATE_TEST_PYTHON=$venv/bin/python
}

# node_modules makes target/npm with the real clients that come from npm.
node_modules() {
  local wanted=mqtt@5.16.0
  need_debian node:nodejs npm:npm
  if [ "$(cat "$target/npm/installed" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$target/npm"
    mkdir -p "$target/npm"
    npm install --silent --no-audit --no-fund --no-package-lock --prefix "$target/npm" "$wanted"
    echo "$wanted" >"$target/npm/installed"
  fi
  export NODE_PATH=$target/npm/node_modules
}

# The integration tests whose file name does (interop) or does not (integration) begin with interop_.
test_files() {
  local file name
  for file in tests/*.rs; do
    name=$(basename "$file" .rs)
    case $1:$name in
      interop:interop_*) echo "--test $name" ;;
      integration:interop_* | integration:docs) ;;
      integration:*) echo "--test $name" ;;
    esac
  done
}

gate_fmt() { # rustfmt, here and in fuzz/
  cargo fmt --all --check
  [ ! -d fuzz ] || cargo fmt --manifest-path fuzz/Cargo.toml --check
  local script
  for script in ci.sh .ci/run cross/*.sh fuzz/*.sh packaging/*.sh packaging/deb/*; do [ ! -e "$script" ] || bash -n "$script"; done
}

gate_lint() { # clippy over everything, warnings are errors
  cargo clippy -q --locked --workspace --all-targets -- -D warnings
}

gate_unit() { # the tests inside the crates, doc tests included
  cargo test -q --locked --workspace --lib --bins
  cargo test -q --locked --workspace --doc
}

gate_integration() { # tests/*.rs: layers, faults, hostile input, kill -9
  need_debian mosquitto:mosquitto nginx:nginx haproxy:haproxy
  # shellcheck disable=SC2046
  cargo test --locked --no-fail-fast -p tidegate $(test_files integration)
  local crate
  for crate in protocols/*/; do
    compgen -G "${crate}tests/*.rs" >/dev/null || continue
    cargo test -q --locked -p "tidegate-$(basename "$crate")" --test '*'
  done
}

gate_interop() { # mosquitto, curl, h2load, libcoap, aiocoap, paho, MQTT.js and rumqttc against the real binary
  need_debian mosquitto:mosquitto mosquitto_pub:mosquitto-clients curl:curl coap-client-notls:libcoap3-bin h2load:nghttp2-client haproxy:haproxy
  python_venv
  node_modules
  # shellcheck disable=SC2046
  TIDEGATE_INTEROP=1 cargo test --locked --no-fail-fast -p tidegate $(test_files interop)
}

gate_docs() { # rustdoc without warnings; links, files and commands in the documents exist
  # A link to a private item is of use in the source, where these comments are read.
  RUSTDOCFLAGS="-D warnings -A rustdoc::private_intra_doc_links" cargo doc -q --locked --workspace --no-deps
  cargo test -q --locked -p tidegate --test docs
}

gate_deny() { # licences, bans, duplicates, sources, advisories; engines stay free of IO crates
  local engine bad
  for engine in protocols/*/; do
    engine=tidegate-$(basename "$engine")
    bad=$(cargo tree -q --locked -p "$engine" -e normal --prefix none | grep -E '^(tokio|hyper|rustls|rusqlite|rand|getrandom|mio|socket2) ' || true)
    [ -z "$bad" ] || fail "$engine must do no IO, and depends on: $bad"
  done
  bad=$(cargo tree -q --locked -e normal --prefix none --target all -i aws-lc-rs 2>/dev/null || true)
  [ -z "$bad" ] || fail "a second TLS provider slipped in: $bad"
  cargo_deny
}

cargo_deny() {
  local tool=$target/tools/bin/cargo-deny
  if command -v cargo-deny >/dev/null; then
    tool=cargo-deny
  elif [ ! -x "$tool" ]; then
    # A debug build answers the same questions and takes half the time to make.
    say "building cargo-deny from crates.io, once"
    CARGO_TARGET_DIR=$target/tools/build CARGO_PROFILE_DEV_DEBUG=0 \
      cargo install -q --locked --debug --no-default-features --version "$cargo_deny_version" --root "$target/tools" cargo-deny
    rm -rf "$target/tools/build"
  fi
  "$tool" --all-features --locked check --hide-inclusion-graph licenses bans sources
  # The advisory database is a git repository; where only package registries are reached it cannot be had.
  local log=$state/advisories.log
  if timeout 120 "$tool" --all-features --locked check --hide-inclusion-graph advisories >"$log" 2>&1; then
    cat "$log"
  elif grep -qiE 'failed to (fetch|acquire|load|open|clone)|unable to (fetch|find)|could not (fetch|clone)|connect' "$log" &&
    ! grep -qE '^error\[(vulnerability|unmaintained|unsound|yanked)' "$log"; then
    note "security advisories: the RustSec database cannot be fetched from here (see $log)"
  else
    cat "$log" >&2
    return 1
  fi
}
cargo_deny_version=0.20.2

gate_arm() { # builds for aarch64 and ARMv6 (ARM_TARGETS adds ARMv7) and runs each binary under qemu
  cross/setup.sh
  cross/smoke.sh
}

gate_fuzz() { # a few seconds of libFuzzer for every target, from the seeds in tests/data
  need_debian g++:g++
  bash fuzz/run.sh
}

gate_demo() { # the README's first command
  cargo build -q --release --locked
  local log=$state/demo.log
  timeout 120 cargo run -q --release --locked -- demo --seconds 20 >"$log" 2>&1 </dev/null || { tail -50 "$log"; fail "demo failed"; }
  tail -20 "$log"
  grep -qE '(^|[^0-9])0 lost|lost:? +0([^0-9]|$)' "$log" || fail "demo does not say that nothing was lost (see $log)"
}

gate_bench-smoke() { # the benchmark suite runs; its times mean nothing at this length, its instruction counts have to be kept
  need_debian mosquitto:mosquitto nginx:nginx haproxy:haproxy wrk:wrk h2load:nghttp2-client valgrind:valgrind
  cargo build -q --release --locked -p tidegate -p tidegate-bench
  local brief=(--seconds "${BENCH_SECONDS:-1}" --rounds 1)
  cargo run -q --release --locked -p tidegate-bench -- http mqtt coap durable idle policy path "${brief[@]}" </dev/null
  # All transports, sizes and numbers of connections would take five minutes, and the rest of them the same ways. The binaries are those just run:
  # cargo would build them anew, since the two packages ask for different features.
  "$target/release/tidegate-bench" proxy --only "1 kB, 64 connections" --build "tidegate=$target/release/tidegate" "${brief[@]}" </dev/null
}

gates=(fmt lint unit integration interop docs deny arm fuzz demo bench-smoke)

run_gate() { # in a process of its own, so that set -e means what it says and a hang ends
  local gate=$1 from=$SECONDS code=0
  echo "=== $gate"
  timeout -k 10 "$((${CI_GATE_MINUTES:-40} * 60))" bash "$repo/ci.sh" --one "$gate" </dev/null || code=$?
  case $code in
    0) passed=$((passed + 1)) verdict=passed ;;
    124 | 137) failed=$((failed + 1)) verdict="TIMED OUT" ;;
    *) failed=$((failed + 1)) verdict=FAILED ;;
  esac
  table+=$(printf '%-12s %-9s %5d s' "$gate" "$verdict" $((SECONDS - from)))$'\n'
}

mkdir -p "$state"
case ${1:-} in
  --one) "gate_$2"; exit ;;
  --list) sed -n 's/^gate_\([a-z-]*\)() { # \(.*\)/\1\t\2/p' ci.sh | expand -t 14; exit ;;
  -*) sed -n '2,14s/^# \{0,1\}//p' ci.sh; [ "$1" = --help ] && exit 0 || exit 2 ;;
esac
[ $# -gt 0 ] || set -- "${gates[@]}"
for gate in "$@"; do
  case " ${gates[*]} " in *" $gate "*) ;; *) echo "ci: no gate \"$gate\"; there are: ${gates[*]}" >&2; exit 2 ;; esac
done
passed=0 failed=0 table=
: >"$state/notes"
for gate in "$@"; do run_gate "$gate"; done
echo "=== summary ($host, $(nproc) cores, $((SECONDS / 60)) min $((SECONDS % 60)) s)"
printf '%s' "$table"
while read -r line; do echo "not checked: $line"; done <"$state/notes"
echo "$passed passed, $failed failed"
[ "$failed" = 0 ]
