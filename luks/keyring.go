package luks

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// withVolumeKey runs f while the volume key is in the calling thread's keyring,
// where dm-crypt finds it. The caller's thread must be its own and end soon after.
func withVolumeKey(uuid string, vk *secret.Bytes, f func() error) error {
	defer clearThreadKeyring()
	err := vk.Use(func(key []byte) error {
		_, err := unix.AddKey("logon", volumeKeyName(uuid), key, unix.KEY_SPEC_THREAD_KEYRING)
		return err
	})
	if err != nil {
		return fmt.Errorf("hand the volume key to the kernel's keyring: %w", err)
	}
	return f()
}

// clearThreadKeyring drops the keys that an activation left in the thread's keyring.
// dm-crypt has its own copy by then. Revoking frees a key's content; unlinked only,
// it would wait for the kernel's garbage collector. Asking for the keyring's ID
// without creating it keeps threads that never had one as they are.
func clearThreadKeyring() {
	ring, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_THREAD_KEYRING, false)
	if err != nil {
		return
	}
	const serial = 4 // bytes of a key's ID
	list := make([]byte, 64*serial)
	if n, err := unix.KeyctlBuffer(unix.KEYCTL_READ, ring, list, 0); err == nil {
		for keys := list[:min(n, len(list))]; len(keys) >= serial; keys = keys[serial:] {
			_, _ = unix.KeyctlInt(unix.KEYCTL_REVOKE, int(int32(binary.NativeEndian.Uint32(keys))), 0, 0, 0)
		}
	}
	_, _ = unix.KeyctlInt(unix.KEYCTL_CLEAR, ring, 0, 0, 0)
}
