#!/bin/bash
# Puts keyagent into an initrd of dracut, where it is configured for that. The initrd has
# systemd, whose networkd reads ip=, vlan= and nameserver=.

check() {
	[[ -e /etc/keyagent/initrd.yaml ]] || return 1
	require_binaries keyagent || return 1
	return 0
}

depends() {
	echo systemd systemd-initrd systemd-networkd dm kernel-network-modules
}

installkernel() {
	hostonly='' instmods dm_crypt dm_integrity authenc hmac xts aegis128 aegis128_aesni aesni_intel algif_skcipher algif_hash cryptd sha256_ssse3 \
		tpm_crb tpm_tis tpm_tis_core sev-guest tdx-guest tsm configfs \
		virtio_pci virtio_blk virtio_scsi virtio_net nvme hv_vmbus hv_storvsc hv_netvsc gve ena mana 8021q
}

# dracut does not look at the status of install(), and an initrd without its
# configuration would not start.
must() {
	"$@" || { dfatal "keyagent: $* failed"; exit 1; }
}

install() {
	must inst_binary keyagent
	inst_multiple -o mke2fs mkfs.ext4 e2fsck resize2fs mkfs.xfs mkfs.btrfs /etc/mke2fs.conf
	must keyagent initrd install --systemd "$initdir"
	must inst_simple "$systemdsystemunitdir/keyagent-initrd.service"
	must "$SYSTEMCTL" -q --root "$initdir" add-wants initrd-root-device.target keyagent-initrd.service
	# The phases of the boot in PCR 11: with them a policy can tell the initrd from what
	# runs later. dracut's own module for them wants tpm2-tools as well.
	inst_multiple -o "$systemdutildir"/systemd-pcrphase "$systemdutildir"/systemd-pcrextend \
		"$systemdsystemunitdir"/systemd-pcrphase-initrd.service "$systemdsystemunitdir"/initrd.target.wants/systemd-pcrphase-initrd.service
	inst_libdir_file "libtss2-esys.so*" "libtss2-mu.so*" "libtss2-rc.so*" "libtss2-sys.so*" "libtss2-tcti-device.so*"
	must /usr/lib/keyagent/initrd-quiet "$initdir"
}
