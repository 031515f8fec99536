#!/bin/bash
# Prepares a Debian machine (x86-64, root) to build Tidegate as a static binary for ARM Linux and to run the result under qemu, with
# Debian's packages, PyPI and crates.io only: no rustup, no Docker, no download of prebuilt tools from anywhere else.
# Everything but the apt packages stays below ARM_ROOT; a second run does only what is missing.
#
#   ARM_ROOT     where the toolchain goes        (default: target/arm-toolchain of this clone)
#   ARM_TARGETS  Rust target names, by blanks    (default: aarch64 and ARMv6; armv7-unknown-linux-musleabihf and, for
#                industrial PCs, x86_64-unknown-linux-musl too if named)
#   ARM_JOBS     jobs while building std         (default: one per core)
#
# Then:  . $ARM_ROOT/env.sh && cargo zigbuild --profile dist --no-default-features --target aarch64-unknown-linux-musl
# `./ci.sh arm` does both and runs the binaries. Who has Docker uses Cross.toml instead: see README.md beside this file.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
root=${ARM_ROOT:-$repo/target/arm-toolchain}
targets=${ARM_TARGETS:-aarch64-unknown-linux-musl arm-unknown-linux-musleabihf}
jobs=${ARM_JOBS:-$(nproc)}
zig_version=0.17.0
zigbuild_version=0.24.0

say() { echo "cross/setup.sh: $*"; }
fail() { say "$*" >&2; exit 1; }
apt_get() { apt-get -qq -o DPkg::Lock::Timeout=600 -o APT::Sandbox::User=root "$@"; }
have() { dpkg-query -W -f='${Status}' "$1" 2>/dev/null | grep -q 'ok installed'; }

[ "$(uname -m)" = x86_64 ] || fail "this recipe is for x86-64 hosts; on an ARM machine, cargo build --release is enough"
command -v apt-get >/dev/null || fail "this recipe needs Debian's apt-get; elsewhere use cross with Docker (cross/README.md)"
mkdir -p "$root"
root=$(cd "$root" && pwd)
exec 9>"$root/.lock"
flock 9

missing_packages() {
  for package in qemu-user-static gcc libc6-dev binutils python3-venv; do
    have "$package" || echo "$package"
  done
}

install_packages() {
  local missing
  missing=$(missing_packages | tr '\n' ' ')
  [ -n "$missing" ] || [ ! -x "$root/bin/rustc" ] || return 0
  [ "$(id -u)" = 0 ] || fail "needs root to install: $missing(or install them by hand and run again)"
  for _ in 1 2 3; do apt_get update && break; sleep 10; done
  [ -n "$missing" ] || return 0
  say "installing $missing"
  # shellcheck disable=SC2086
  DEBIAN_FRONTEND=noninteractive apt_get install -y --no-install-recommends $missing >/dev/null
}

# Debian's rustc, cargo and the source of their std, unpacked beside the system instead of installed:
# the machine's own cargo and rustc stay what they are.
unpack_rust() {
  [ -x "$root/bin/rustc" ] && return
  local want="cargo-web rustc-web rust-web-src" list
  rm -rf "$root/debs" "$root/tc"
  mkdir -p "$root/debs" "$root/tc" "$root/bin"
  # What an installation would bring in (the host's std, its LLVM, libgit2 ...), whatever the versions are today.
  # shellcheck disable=SC2086
  list=$(apt-get -s install --no-install-recommends $want | awk '/^Inst/{print $2}')
  for package in $want libstd-rust-web-dev; do
    case " $(echo $list) " in *" $package "*) ;; *) list="$list $package" ;; esac
  done
  say "downloading" $list
  # shellcheck disable=SC2086
  (cd "$root/debs" && apt_get download $list)
  for deb in "$root"/debs/*.deb; do dpkg -x "$deb" "$root/tc"; done
  rm -rf "$root/debs"
  # rustc comes last: its presence says that this step is complete.
  for tool in rustdoc cargo rustc; do
    printf '#!/bin/sh\nLD_LIBRARY_PATH=%s${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} exec %s "$@"\n' \
      "$root/tc/usr/lib/x86_64-linux-gnu" "$root/tc/usr/bin/$tool" >"$root/bin/$tool"
    chmod +x "$root/bin/$tool"
  done
}

# zig is C compiler and linker for every target; it brings musl and libunwind.
install_zig() {
  "$root/venv/bin/cargo-zigbuild" --version 2>/dev/null | grep -qF "$zigbuild_version" && return
  python3 -m venv "$root/venv"
  "$root/venv/bin/pip" install -q --disable-pip-version-check "ziglang==$zig_version" "cargo-zigbuild==$zigbuild_version"
}

# The standard library of one target, built once into that compiler's own folder; about 65 s of CPU. Without backtraces: a stripped binary has no
# names to put into them.
build_std() {
  local target=$1 lib=$root/tc/usr/lib/rustlib/$1/lib
  [ -e "$lib/.complete" ] && return
  say "building std for $target"
  (
    cd "$root"/tc/usr/src/rustc-*/library
    env -u CARGO_BUILD_TARGET -u CARGO_ENCODED_RUSTFLAGS -u CARGO_INCREMENTAL \
      RUSTC="$root/bin/rustc" RUSTDOC="$root/bin/rustdoc" RUSTC_BOOTSTRAP=1 \
      RUSTFLAGS="-Zforce-unstable-if-unmarked -Cembed-bitcode=yes" \
      CARGO_TARGET_DIR="$root/stdbuild" CARGO_PROFILE_DIST_DEBUG=0 CARGO_PROFILE_DIST_OPT_LEVEL=s __CARGO_DEFAULT_LIB_METADATA=stddist \
      "$root/bin/cargo" build -q -j"$jobs" --locked --profile dist --target "$target" -p sysroot \
      --features panic-unwind
  )
  mkdir -p "$lib"
  rm -f "$lib"/*.rlib
  cp "$root/stdbuild/$target"/dist/deps/*.rlib "$lib/"
  touch "$lib/.complete"
}

write_env() {
  cat >"$root/env.sh" <<ENV
export PATH=$root/bin:$root/venv/bin:\$PATH
export CARGO=$root/bin/cargo RUSTC=$root/bin/rustc RUSTDOC=$root/bin/rustdoc
export CARGO_ZIGBUILD_CACHE_DIR=$root/cache XDG_CACHE_HOME=$root/cache
# rustc must not look for start files of its own: zig brings them
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUSTFLAGS="-Clink-self-contained=no"
export CARGO_TARGET_ARMV7_UNKNOWN_LINUX_MUSLEABIHF_RUSTFLAGS="-Clink-self-contained=no"
export CARGO_TARGET_ARM_UNKNOWN_LINUX_MUSLEABIHF_RUSTFLAGS="-Clink-self-contained=no"
export CARGO_TARGET_X86_64_UNKNOWN_LINUX_MUSL_RUSTFLAGS="-Clink-self-contained=no"
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_MUSL_RUNNER="qemu-aarch64-static"
export CARGO_TARGET_ARMV7_UNKNOWN_LINUX_MUSLEABIHF_RUNNER="qemu-arm-static -cpu cortex-a7"
export CARGO_TARGET_ARM_UNKNOWN_LINUX_MUSLEABIHF_RUNNER="qemu-arm-static -cpu arm1176"
unset LD_LIBRARY_PATH RUSTUP_TOOLCHAIN
ENV
}

install_packages
unpack_rust
say "$("$root/bin/rustc" -V), $("$root/bin/cargo" -V)"
install_zig
for target in $targets; do build_std "$target"; done
rm -rf "$root/stdbuild"
write_env
say "ready: . $root/env.sh"
