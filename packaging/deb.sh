#!/bin/bash
# Makes a Debian package of a binary that is already built.
#
#   packaging/deb.sh BINARY [FOLDER]      writes FOLDER/tidegate_VERSION_ARCHITECTURE.deb (default: target/packages)
#
# The architecture is read from the binary. ARMv6 and ARMv7 are both "armhf": on a Pi 1 or Zero install only the package
# of the arm-unknown-linux-musleabihf binary; it runs on the later ones as well.
set -euo pipefail
repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
say() { echo "packaging/deb.sh: $*"; }
fail() { say "$*" >&2; exit 1; }
[ $# -ge 1 ] || { sed -n '2,7s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; exit 2; }
binary=$1
folder=${2:-$repo/target/packages}
[ -f "$binary" ] || fail "no such file: $binary"
command -v dpkg-deb >/dev/null || fail "missing: dpkg-deb (Debian package dpkg)"

# e_machine of the ELF header.
case $(od -An -tx1 -j18 -N2 "$binary" | tr -d ' ') in
  3e00) architecture=amd64 ;;
  b700) architecture=arm64 ;;
  2800) architecture=armhf ;;
  *) fail "$binary is not a binary for x86-64, aarch64 or arm" ;;
esac
version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$repo/Cargo.toml" | head -1)
# Without this library in it, the binary is static and depends on nothing.
depends=
! grep -q 'libc\.so\.6' "$binary" || depends="libc6, libgcc-s1, "

stage=$(mktemp -d)
trap 'rm -rf "$stage"' EXIT
chmod 0755 "$stage"
install -D -m 0755 "$binary" "$stage/usr/bin/tidegate"
install -D -m 0644 "$repo/packaging/tidegate.service" "$stage/usr/lib/systemd/system/tidegate.service"
for file in README.md CHANGELOG.md LICENSE-MIT LICENSE-APACHE; do
  [ ! -f "$repo/$file" ] || install -D -m 0644 "$repo/$file" "$stage/usr/share/doc/tidegate/$file"
done
for file in "$repo"/config/*.toml; do install -D -m 0644 "$file" "$stage/usr/share/doc/tidegate/examples/$(basename "$file")"; done
install -d "$stage/DEBIAN"
install -m 0755 "$repo"/packaging/deb/{postinst,prerm,postrm} "$stage/DEBIAN/"
cat >"$stage/DEBIAN/control" <<CONTROL
Package: tidegate
Version: $version
Architecture: $architecture
Maintainer: Tidegate maintainers <maintainers@tidegate.invalid>
Installed-Size: $(du -sk --exclude=DEBIAN "$stage" | cut -f1)
Depends: ${depends}passwd, util-linux
Section: net
Priority: optional
Description: IoT edge gateway for MQTT, CoAP and HTTP
 One identity and one policy for devices over MQTT, CoAP and HTTP, a durable
 queue for the time when the uplink is down, and a load-balanced way to the cloud.
CONTROL
mkdir -p "$folder"
package=$folder/tidegate_${version}_$architecture.deb
dpkg-deb --root-owner-group -Zxz --build "$stage" "$package" >/dev/null
say "$package, $(($(stat -c %s "$package") / 1000)) kB"
