#!/usr/bin/env bash
# Downloads and unpacks what the RDMA tests need: QEMU, Debian's kernel with soft-RoCE (`rdma_rxe`), and a small userland for the
# guest. Installs nothing. About 100 MB; needs apt, so Debian or Ubuntu with Debian's archive.
#
#   prepare.sh FOLDER     ends with 3 and says why where this cannot be done
set -euo pipefail
folder="$(mkdir -p "$1" && cd "$1" && pwd)"
[ -e "$folder/ready" ] && exit 0
cannot() { echo "RDMA cannot be tested on this machine: $1"; exit 3; }
command -v apt-get > /dev/null && command -v dpkg-deb > /dev/null || cannot "there is no apt-get"
[ "$(uname -m)" = x86_64 ] || cannot "the guest is for x86_64"

debs="$folder/debs"
mkdir -p "$debs/qemu/partial" "$debs/guest/partial" "$debs/kernel"
if ! apt-cache show qemu-system-x86 > /dev/null 2>&1; then
    apt-get update -qq || cannot "the package lists cannot be had"
fi

# Packages and all that they need beyond what a status file lists as installed.
fetch() { # FOLDER STATUS PACKAGE...
    local into="$1" status="$2"
    shift 2
    apt-get -qq -y --no-install-recommends --download-only -o Debug::NoLocking=1 -o APT::Sandbox::User=root \
        -o Dir::Cache::archives="$into" -o Dir::State::status="$status" install "$@" > /dev/null ||
        cannot "these packages cannot be downloaded: $*"
}

: > "$folder/nothing-installed"
fetch "$debs/qemu" /var/lib/dpkg/status qemu-system-x86
fetch "$debs/guest" "$folder/nothing-installed" ibverbs-providers librdmacm1 iproute2 busybox-static libgcc-s1
# The `-cloud` kernels have no soft-RoCE.
kernel="$(apt-cache depends linux-image-amd64 | sed -n 's/.*Depends: \(linux-image-[0-9.]*-[0-9]*-amd64\)$/\1/p' | head -1)"
[ -n "$kernel" ] || cannot "there is no kernel package of Debian"
(cd "$debs/kernel" && apt-get -qq -o APT::Sandbox::User=root download "$kernel" > /dev/null) || cannot "$kernel cannot be downloaded"

for part in qemu guest kernel; do
    mkdir -p "$folder/$part"
    for deb in "$debs/$part"/*.deb; do dpkg-deb -x "$deb" "$folder/$part"; done
done

# The guest's files: busybox, `ip` and `rdma` of iproute2, the verbs libraries, the modules.
root="$folder/root"
rm -rf "$root"
mkdir -p "$root"/{bin,sbin,dev,proc,sys,tmp,etc,usr}
cp -a "$folder/guest/usr/lib" "$root/usr/lib"
for merged in lib lib64; do
    if [ -d "$folder/guest/$merged" ]; then
        mkdir -p "$root/$merged"
        cp -a "$folder/guest/$merged/." "$root/$merged/"
    fi
done
cp -a "$folder/guest/etc/libibverbs.d" "$root/etc/"
cp "$(find "$folder/guest" -path '*bin/busybox' -type f | head -1)" "$root/bin/busybox"
for tool in ip rdma; do cp "$(find "$folder/guest" -path "*bin/$tool" -type f | head -1)" "$root/bin/$tool"; done
for tool in sh mount modprobe cat echo poweroff ln ls mkdir stty; do ln -sf busybox "$root/bin/$tool"; done
# The kernel calls it by this name when it needs a module itself.
ln -sf ../bin/busybox "$root/sbin/modprobe"

version="$(basename "$(ls -d "$folder"/kernel/lib/modules/*)")"
from="$folder/kernel/lib/modules/$version"
modules="$root/lib/modules/$version"
mkdir -p "$modules/kernel"
cp "$from"/modules.{order,builtin} "$modules/"
for path in drivers/infiniband/core drivers/infiniband/sw drivers/net/dummy.ko net/ipv4/udp_tunnel.ko \
    net/ipv6/ip6_udp_tunnel.ko fs/configfs crypto lib; do
    if [ -e "$from/kernel/$path" ]; then
        mkdir -p "$modules/kernel/$(dirname "$path")"
        cp -a "$from/kernel/$path" "$modules/kernel/$(dirname "$path")/"
    fi
done
"$root/bin/busybox" depmod -b "$root" "$version"
cp "$folder/kernel/boot/vmlinuz-$version" "$folder/vmlinuz"
(cd "$root" && find . | ./bin/busybox cpio -o -H newc 2> /dev/null) | gzip -1 > "$folder/root.cpio.gz"
rm -rf "$debs" "$folder/kernel" "$folder/guest"
touch "$folder/ready"
