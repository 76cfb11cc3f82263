package luks

import (
	"cmp"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// A throw-away mapping is for swap and scratch space. Its key is made by the kernel,
// as a key of the type "encrypted", and is never in user space. Such a key is bound to
// a master key, which only serves to export it and is revoked at once.

func throwawayUUID(name string) string { return "CRYPT-PLAIN-" + name }

func throwawayKeyName(name string) string { return "keyagent:throwaway-" + name }

func throwawayKeyRef(name string) string {
	return fmt.Sprintf(":%d:encrypted:%s", volumeKeySize, throwawayKeyName(name))
}

func checkThrowaway(m liveMapping, name string) (Mapping, error) {
	return checkCrypt(m, Mapping{Name: name, Throwaway: true}, plain, throwawayKeyRef(name), 0)
}

// OpenThrowaway maps a whole device, rounded down to 4096 bytes, under a key that
// nobody knows and that is gone when the mapping is. What was on the device is lost,
// so the caller must have been told by name to do this. A device that holds a
// filesystem, a partition table, LUKS, LVM or anything else that libblkid knows is
// refused with [ErrNotBlank], except for a plain swap area. A mapping of that name
// that OpenThrowaway made on this device is returned as it is.
func OpenThrowaway(ctx context.Context, device, name string, opts OpenOptions) (Mapping, error) {
	m, err := openThrowaway(ctx, device, name, opts)
	if err != nil {
		return Mapping{}, fmt.Errorf("open throw-away mapping %.80q: %w", name, err)
	}
	return m, nil
}

func openThrowaway(ctx context.Context, device, name string, opts OpenOptions) (m Mapping, err error) {
	if err := validateName(name); err != nil {
		return m, err
	}
	release, err := mappings.acquire(ctx, name)
	if err != nil {
		return m, err
	}
	defer release()
	live, err := inspect(name)
	if err == nil && !(live.empty && live.open == 0 && live.uuid == throwawayUUID(name)) {
		return sameThrowaway(live, name, device)
	}
	if err == nil {
		err = remove(ctx, name, live.uuid)
	}
	if err != nil && !errors.Is(err, ErrNotActive) {
		return m, err
	}
	// The claim makes sure that nobody mounts it between the look and the mapping;
	// dm-crypt cannot have it before the claim is given up.
	d, err := openExclusive(ctx, device)
	if err != nil {
		return m, err
	}
	defer d.Close()
	if err := cmp.Or(d.mustBeBlock(), d.mayThrowAway()); err != nil {
		return m, err
	}
	if opts.ReadOnly {
		return m, fmt.Errorf("%w: a throw-away mapping cannot be read-only", ErrInvalid)
	}
	dev, size := d.rdev, d.size&^(dataSectorSize-1)
	d.Close()
	c := creation{name: name, uuid: throwawayUUID(name), kind: cryptKind, bytes: size, params: cryptParams(plain, throwawayKeyRef(name), dev, 0, opts)}
	undo := func() { _ = remove(context.WithoutCancel(ctx), c.name, c.uuid) }
	err = kernelCall(ctx, "mapping "+name, func() error {
		return withKernelKey(throwawayKeyName(name), func() error { return c.create(ctx) })
	}, undo)
	if err != nil {
		return m, err
	}
	if live, err = inspect(name); err == nil {
		if m, err = checkThrowaway(live, name); err == nil {
			err = ensureNode(m)
		}
	}
	if err == nil && (m.DataDevice != dev || m.Bytes != size || m.options() != opts) {
		err = fmt.Errorf("%w: %s is not mapped as asked for", ErrTableMismatch, name)
	}
	if err != nil {
		undo()
		return Mapping{}, err
	}
	return m, nil
}

func sameThrowaway(live liveMapping, name, device string) (Mapping, error) {
	if live.uuid != throwawayUUID(name) {
		return Mapping{}, fmt.Errorf("%w: %s has the UUID %.100q", ErrNameTaken, name, live.uuid)
	}
	m, err := checkThrowaway(live, name)
	if err != nil {
		return Mapping{}, err
	}
	if dev := blockNumber(device); m.DataDevice != dev {
		return Mapping{}, fmt.Errorf("%w: %s lies on device %v, not on %s (%v)", ErrNameTaken, name, m.DataDevice, device, dev)
	}
	return m, ensureNode(m)
}

// mayThrowAway refuses a device that holds something that somebody may miss.
func (d *disk) mayThrowAway() error {
	if d.size < minDataSize {
		return fmt.Errorf("%w: it has %d bytes, needed are %d", ErrDeviceSize, d.size, minDataSize)
	}
	found, err := d.signatures()
	if err != nil {
		return err
	}
	if i := slices.IndexFunc(found, func(s Signature) bool { return s.Type != typeSwap }); i >= 0 {
		return &NotBlankError{Offset: found[i].Offset, Found: found[i].String()}
	}
	return nil
}

// withKernelKey runs f while a random key that the kernel made is in the calling
// thread's keyring.
func withKernelKey(name string, f func() error) error {
	defer clearThreadKeyring()
	master, err := secret.Random(32)
	if err != nil {
		return err
	}
	defer master.Close()
	masterName := "keyagent-master-" + rand.Text()
	var serial int
	err = master.Use(func(key []byte) (err error) {
		serial, err = unix.AddKey("user", masterName, key, unix.KEY_SPEC_THREAD_KEYRING)
		return err
	})
	if err != nil {
		return fmt.Errorf("make a master key: %w", err)
	}
	order := fmt.Sprintf("new default user:%s %d", masterName, volumeKeySize)
	_, err = unix.AddKey("encrypted", name, []byte(order), unix.KEY_SPEC_THREAD_KEYRING)
	_, revokeErr := unix.KeyctlInt(unix.KEYCTL_REVOKE, serial, 0, 0, 0)
	switch {
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w: keys of the type encrypted (CONFIG_ENCRYPTED_KEYS)", ErrKernel)
	case err != nil:
		return fmt.Errorf("have the kernel make a key: %w", err)
	case revokeErr != nil:
		return fmt.Errorf("revoke the master key: %w", revokeErr)
	}
	err = f()
	if errors.Is(err, unix.EINVAL) {
		err = fmt.Errorf("%w: encrypted keys in dm-crypt (Linux 5.10 with CONFIG_ENCRYPTED_KEYS): %w", ErrKernel, err)
	}
	return err
}
