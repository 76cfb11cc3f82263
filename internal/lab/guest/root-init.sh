#!/bin/sh
# PID 1 of the initrd of the guest with systemd: modules, the disk whose serial
# number is "root", switch to it.
export PATH=/bin:/sbin
mount -t proc proc /proc
. /bed/lib.sh
mark userspace
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
while read -r module; do
	insmod "$module" || echo "bed: insmod $module failed"
done </bed/modules
for disk in /sys/block/vd*; do
	[ "$(cat "$disk/serial")" = root ] && mount -t ext4 -o noatime "/dev/${disk##*/}" /mnt
done
mount --move /dev /mnt/dev
mount --move /sys /mnt/sys
mount --move /proc /mnt/proc
exec switch_root /mnt /usr/lib/systemd/systemd
