#!/bin/sh
# Process 1 of a guest. Placeholders are filled in by uml.go.
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/run/tmp TMPDIR=/run/tmp
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs -o size=80% run /run
mkdir -p /run/tmp /run/cryptsetup /run/kernel/lib/modules
ln -s "@MODULES@/$(uname -r)" "/run/kernel/lib/modules/$(uname -r)"
# The kernel asks for algorithms as it meets them, by the program named here.
printf '#!/bin/sh\nexec modprobe -d /run/kernel "$@"\n' >/run/modprobe
chmod 700 /run/modprobe
echo /run/modprobe >/proc/sys/kernel/modprobe
for module in dm-mod dm-crypt dm-flakey dm-zero algif_skcipher algif_hash loop; do
	/run/modprobe "$module" || { echo "cannot load $module"; exit 1; }
done
echo 1 >/proc/sys/kernel/printk
@ENV@
cd @DIR@ || exit 1
echo "=== guest begins ==="
@COMMAND@ </dev/null 2>&1
echo "=== guest ends: $? ==="
echo o >/proc/sysrq-trigger
# The power goes off asynchronously; process 1 must not end before it does.
exec sleep infinity
