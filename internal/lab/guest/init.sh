#!/bin/sh
# PID 1 of the small guest: device nodes, modules, network, the caller's script,
# power off. There is no other program here that a measurement would not cover.
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
mount -t proc proc /proc
. /bed/lib.sh
mark userspace
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mount -t tmpfs -o mode=0755 run /run
mount -t tmpfs tmp /tmp
mount -t securityfs securityfs /sys/kernel/security
while read -r module; do
	insmod "$module" || echo "bed: insmod $module failed"
done </bed/modules

# The names that udev would make.
mkdir -p /dev/disk/by-id /run/cryptsetup
for disk in /sys/block/vd*; do
	link=/dev/disk/by-id/virtio-$(cat "$disk/serial")
	ln -s "/dev/${disk##*/}" "$link"
	for part in "$disk/${disk##*/}"*; do
		[ ! -e "$part/partition" ] || ln -s "/dev/${part##*/}" "$link-part$(cat "$part/partition")"
	done
done

ip link set lo up
ip addr add 10.0.2.15/24 dev eth0
ip link set eth0 up
mark devices

sh /bed/script
echo "KEYAGENT-EXIT $?"
sync
poweroff -f
