#!/bin/bash
# Puts keyagent into an initrd of dracut, where it is configured for that. The initrd has
# systemd, whose networkd reads ip=, vlan= and nameserver=.

check() {
	[[ -e $dracutsysrootdir/etc/keyagent/initrd.yaml ]] || return 1
	require_binaries keyagent || return 1
	return 0
}

depends() {
	echo systemd systemd-initrd systemd-networkd dm kernel-network-modules
}

installkernel() {
	hostonly='' instmods dm_crypt xts aesni_intel algif_skcipher algif_hash cryptd sha256_ssse3 \
		tpm_crb tpm_tis tpm_tis_core sev-guest tdx-guest tsm configfs \
		virtio_pci virtio_blk virtio_scsi virtio_net nvme hv_vmbus hv_storvsc hv_netvsc gve ena mana 8021q
}

install() {
	inst_binary keyagent
	inst_multiple -o mke2fs mkfs.ext4 e2fsck mkfs.xfs mkfs.btrfs /etc/mke2fs.conf
	keyagent initrd install --systemd "$initdir"
	inst_simple "$systemdsystemunitdir/keyagent-initrd.service"
	$SYSTEMCTL -q --root "$initdir" add-wants initrd-root-device.target keyagent-initrd.service
	# The phases of the boot in PCR 11: with them a policy can give a key to the initrd, and
	# to nothing that runs later. dracut's own module for them wants tpm2-tools as well.
	inst_multiple -o "$systemdutildir"/systemd-pcrphase "$systemdutildir"/systemd-pcrextend \
		"$systemdsystemunitdir"/systemd-pcrphase-initrd.service "$systemdsystemunitdir"/initrd.target.wants/systemd-pcrphase-initrd.service
	inst_libdir_file "libtss2-esys.so*" "libtss2-mu.so*" "libtss2-rc.so*" "libtss2-sys.so*" "libtss2-tcti-device.so*"
	# No failure may end in a shell or a prompt: the console is the host's.
	local unit
	for unit in emergency rescue dracut-emergency; do
		inst_simple /usr/lib/keyagent/initrd-stop.service "/etc/systemd/system/$unit.service"
	done
}
