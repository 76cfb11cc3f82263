// Package lab boots measured Linux guests on this machine, for the demo and for
// the end-to-end tests: OVMF measures a unified kernel image into a software
// TPM, and the guest talks to this machine through nothing but the ports that it
// was given.
//
// The parts are made one by one, and each is a file that can be looked at:
//
//	cache, _ := lab.OpenCache("")
//	kernel, _ := cache.Kernel(ctx)
//	ca, _ := lab.NewCA(dir+"/ca", "demo")
//	tpm, _ := ca.NewTPM(ctx, dir+"/tpm", lab.TPMOptions{})
//	_ = lab.Initramfs{Kernel: kernel, Script: "pcrs; eventlog"}.Build(ctx, dir+"/initrd")
//	_ = lab.UKI{Kernel: kernel, Initrd: dir + "/initrd", Command: lab.CommandLine()}.Build(ctx, dir+"/uki.efi")
//	_ = lab.BuildESP(ctx, dir+"/uki.efi", dir+"/esp.img")
//	guest, _ := lab.Boot(ctx, lab.Options{ESP: dir + "/esp.img", TPM: tpm})
//	status, err := guest.Wait(ctx)
//
// There are two guests. The small one is an [Initramfs] alone: everything in it
// is measured, and it is up in seconds. The other one is a Debian with systemd
// ([Cache.Rootfs]), whose root file system is a disk that nothing measures: it
// shows how keyagent lives in a real system, not how a real system must be built.
//
// # What a guest prints
//
// The host follows a guest by its serial console. Lines that begin with
// KEYAGENT- are for the host ([Guest.Marks], [Guest.Section], [Guest.PCRs]); all
// other lines are for people.
//
// # Which PCRs are the same in every boot
//
// All of them, 0 to 15, for one image and one [Options.Memory] and [Options.CPUs],
// whether the firmware's variables are kept ([Options.Vars]) or fresh, and
// whatever disks beyond the first and forwards there are. Two other sizes of
// memory, or numbers of CPUs, give two values of PCR 0: OVMF measures its main
// volume after it has unpacked it into memory and adapted it. So a reference
// value for PCR 0 holds for one shape of machine. An image that differs by its
// command line, initrd or kernel differs in PCRs 4, 9 and 11. The guest with
// systemd goes on to measure its progress into PCR 11 ("sysinit", "ready", and
// when it goes off "shutdown", "final"): what is attested there depends on when.
//
// # What it needs
//
// Programs of Debian 12, listed in test/deps/packages. A missing one is
// [ErrMissingTool], whose text says what to run; nothing here skips or
// downgrades. CPU emulation (TCG) is used on purpose: it is the same everywhere,
// and works in CI.
package lab
