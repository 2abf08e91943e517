#!/usr/bin/env bash
# Runs a program in a virtual machine that has soft-RoCE: a Cargo runner. The guest has one RDMA device with two addresses,
# which CAIRN_RDMA names; the program's output, and its exit status, are this script's.
#
#   CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER=$PWD/tests/rdma/run.sh \
#       cargo test --features rdma -p cairn-tests --test wires --test rdma
#
# CAIRN_RDMA_VM (an absolute path; default: target/rdma-vm) is the folder that prepare.sh fills; CAIRN_RDMA_FILES names files and folders to be copied into
# the guest's /files. Other variables that begin with CAIRN_ or RUST_ are passed on.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
vm="${CAIRN_RDMA_VM:-$here/../../target/rdma-vm}"
memory_mib="${CAIRN_RDMA_MIB:-4096}"
"$here/prepare.sh" "$vm"
vm="$(cd "$vm" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

program="$1"
shift
mkdir -p "$work/add/files"
cp "$program" "$work/add/program"
strip "$work/add/program" 2> /dev/null || true
for path in ${CAIRN_RDMA_FILES:-}; do cp -a "$path" "$work/add/files/"; done
{
    for name in $(compgen -e | grep -E '^(CAIRN|RUST)_' | grep -vE '^CAIRN_(RDMA|CI|TRACES)'); do
        printf 'export %s=%q\n' "$name" "${!name}"
    done
    printf 'set --'
    for argument in "$@"; do printf ' %q' "$argument"; done
    printf '\n'
} > "$work/add/environment"
cat > "$work/add/init" <<'INIT'
#!/bin/sh
export PATH=/bin:/sbin HOME=/tmp CAIRN_RDMA=10.77.0.1,10.77.0.2
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o size=90% tmp /tmp
stty -F /dev/ttyS1 -opost
for module in crc32_generic dummy rdma_rxe rdma_ucm; do modprobe $module 2> /dev/ttyS1; done
ip link set lo up
ip link add fabric type dummy
ip link set fabric mtu 4500 up
ip addr add 10.77.0.1/24 dev fabric
ip addr add 10.77.0.2/24 dev fabric
rdma link add rxe0 type rxe netdev fabric 2> /dev/ttyS1
. /environment
cd /tmp
# Not straight to the port, which programs take for a person's terminal.
{ /program "$@" < /dev/null 2>&1; echo "status $?" > /dev/ttyS2; } | cat > /dev/ttyS1
poweroff -f
INIT
chmod +x "$work/add/init"
{
    cat "$vm/root.cpio.gz"
    (cd "$work/add" && find . | "$vm/root/bin/busybox" cpio -o -H newc 2> /dev/null) | gzip -1
} > "$work/initrd"

libraries="$vm/qemu/usr/lib/x86_64-linux-gnu:$vm/qemu/lib/x86_64-linux-gnu"
LD_LIBRARY_PATH="$libraries" "$vm/qemu/usr/bin/qemu-system-x86_64" \
    -L "$vm/qemu/usr/share/qemu" -L "$vm/qemu/usr/share/seabios" \
    -accel tcg,thread=multi -cpu max -smp 2 -m "$memory_mib" -display none -nodefaults -no-reboot \
    -kernel "$vm/vmlinuz" -initrd "$work/initrd" -append "console=ttyS0 quiet no_timer_check panic=-1" \
    -serial "file:$work/console" -chardev stdio,id=out,signal=on -serial chardev:out -serial "file:$work/status" < /dev/null
status="$(sed -n 's/^status \([0-9]*\).*/\1/p' "$work/status")"
if [ -z "$status" ]; then
    echo "the virtual machine ended before the program did:"
    tail -20 "$work/console"
    exit 1
fi
exit "$status"
