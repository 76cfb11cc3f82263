package csiproxy

import "github.com/keyagent/keyagent/internal/mount"

// Kernel is the [Mounter] of this process's mount namespace.
type Kernel struct{}

// BindFolder implements [Mounter].
func (Kernel) BindFolder(from string, device uint64, to string, options []string) error {
	return mount.BindFolder(mount.Source{Path: from, Device: device}, to, options)
}

// BindDevice implements [Mounter].
func (Kernel) BindDevice(from string, device uint64, to string) error {
	return mount.BindDevice(mount.Source{Path: from, Device: device}, to)
}

// Clear implements [Mounter].
func (Kernel) Clear(path string) error { return mount.Clear(path) }

// Device implements [Mounter].
func (Kernel) Device(path string) (uint64, error) { return mount.DeviceAt(path) }

// Number implements [Mounter].
func (Kernel) Number(path string) uint64 { return mount.Number(path) }

// Holders implements [Mounter].
func (Kernel) Holders(device uint64) []string { return mount.Stacked(device) }

// Points implements [Mounter].
func (Kernel) Points(device uint64) ([]string, error) { return mount.Points(device) }

// Remove implements [Mounter].
func (Kernel) Remove(dir string) error { return mount.Remove(dir) }
