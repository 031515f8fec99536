#!/bin/bash
# Builds Tidegate for the Raspberry Pi targets and runs each binary end to end under qemu: tests/first_message.rs, one
# authenticated message over each protocol that has to arrive at a real backend. Needs what cross/setup.sh installs.
#
#   ARM_TARGETS  Rust target names, by blanks         (default: aarch64 and ARMv6, whose code every 32-bit Pi runs)
#   ARM_ROOT     where cross/setup.sh put the toolchain  (default: target/arm-toolchain of this clone)
#   ARM_TARGET   the build folder, for this linker only  (default: arm/ in CARGO_TARGET_DIR, or target/arm)
#
# aarch64 is built as it ships (`dist`), and its size is held against the bar of 10 MB; so is x86_64, if it is named. The others are built
# as `arm-check`, the same code with less optimisation. The two profiles are built side by side. Timings under qemu say nothing about a Pi; resident memory
# includes the emulator and its translated code, so it is only an upper bound.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$repo"
root=${ARM_ROOT:-$repo/target/arm-toolchain}
folder=${ARM_TARGET:-${CARGO_TARGET_DIR:-$repo/target}/arm}
size_max=10000000

say() { echo "cross/smoke.sh: $*"; }
fail() { say "$*" >&2; exit 1; }
[ -r "$root/env.sh" ] || fail "no toolchain in $root: run cross/setup.sh first (ARM_ROOT says where it is)"
# shellcheck disable=SC2086
set -- ${ARM_TARGETS:-aarch64-unknown-linux-musl arm-unknown-linux-musleabihf}

profile() { case $1 in aarch64-* | x86_64-*) echo dist ;; *) echo arm-check ;; esac; }
binary() { echo "$folder/$1/$(profile "$1")/tidegate"; }
emulator() { # the runner that env.sh names, such as `qemu-arm-static -cpu arm1176`; none for this machine's own code
  # shellcheck disable=SC1091
  (. "$root/env.sh"; variable=CARGO_TARGET_$(tr a-z- A-Z_ <<<"$1")_RUNNER; echo "${!variable-}")
}

# In a subshell: the host's own toolchain builds the test.
build() (
  # shellcheck disable=SC1091
  . "$root/env.sh"
  CARGO_TARGET_DIR=$folder CARGO_INCREMENTAL=0 \
    cargo zigbuild -q --locked --no-default-features --profile "$(profile "$1")" --target "$1" -p tidegate --bin tidegate
)

build_all() {
  local target pid beside="" failed=0
  for target in "$@"; do
    [ "$(profile "$target")" = dist ] || continue
    build "$target" &
    beside+=" $!"
  done
  for target in "$@"; do
    [ "$(profile "$target")" = dist ] || build "$target" || failed=1
  done
  for pid in $beside; do wait "$pid" || failed=1; done
  [ "$failed" = 0 ] || fail "does not build"
}

check() {
  local target=$1 program size runner log
  program=$(binary "$target")
  runner=$(emulator "$target")
  log=$folder/$target.log
  size=$(stat -c %s "$program")
  # $runner is a program and its arguments.
  # shellcheck disable=SC2086
  [ "$($runner "$program" --version)" = "tidegate $(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)" ] ||
    fail "$target: --version says: $($runner "$program" --version 2>&1)"
  TIDEGATE_TEST_PROGRAM="$runner $program" \
    cargo test -q --locked -p tidegate --test first_message -- --nocapture --test-threads 1 >"$log" 2>&1 ||
    { tail -80 "$log"; fail "$target: does not pass tests/first_message.rs under $runner"; }
  printf 'arm: %-32s %-9s %4d.%d MB, %s under %s\n' "$target" "$(profile "$target")" $((size / 1000000)) \
    $((size / 100000 % 10)) "$(sed -n 's/.*\(resident: .*\)/\1/p' "$log" | head -1)" "$runner"
  case $target in
    aarch64-* | x86_64-*) [ "$size" -le "$size_max" ] || say "$target: $size bytes, MISSED the bar of $size_max" ;;
  esac
}

build_all "$@"
for target in "$@"; do check "$target"; done
