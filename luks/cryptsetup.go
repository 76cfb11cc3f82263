package luks

/*
#cgo pkg-config: libcryptsetup
#include <stdlib.h>
#include <string.h>
#include <libcryptsetup.h>

// What libcryptsetup had to say during the life of one context. Its messages
// become part of our error instead of lines on somebody's terminal.
struct ka_log {
	size_t len;
	char text[512];
};

static void ka_collect(int level, const char *msg, void *usrptr)
{
	struct ka_log *log = usrptr;
	size_t n;

	if (level != CRYPT_LOG_ERROR || !log || !msg)
		return;
	n = strlen(msg);
	if (n > sizeof(log->text) - log->len)
		n = sizeof(log->text) - log->len;
	memcpy(log->text + log->len, msg, n);
	log->len += n;
}

static void ka_discard(int level, const char *msg, void *usrptr)
{
	(void)level; (void)msg; (void)usrptr;
}

static void ka_silence(void)
{
	crypt_set_debug_level(CRYPT_DEBUG_NONE);
	crypt_set_log_callback(NULL, ka_discard, NULL);
}

static void ka_listen(struct crypt_device *cd, struct ka_log *log)
{
	crypt_set_log_callback(cd, ka_collect, log);
}

// The one form of keyslot that we write: PBKDF2 at the least cost that
// libcryptsetup accepts, since the DEK has full entropy.
static int ka_format(struct crypt_device *cd, const char *cipher, const char *mode,
	const char *uuid, size_t key_size, unsigned sector_size,
	unsigned iterations, unsigned long long data_sectors)
{
	struct crypt_pbkdf_type pbkdf = {
		.type = CRYPT_KDF_PBKDF2, .hash = "sha256",
		.iterations = iterations, .flags = CRYPT_PBKDF_NO_BENCHMARK,
	};
	struct crypt_params_luks2 params = {
		.pbkdf = &pbkdf, .sector_size = sector_size,
	};
	int r;

	if ((r = crypt_set_data_offset(cd, data_sectors)) < 0)
		return r;
	return crypt_format(cd, CRYPT_LUKS2, cipher, mode, uuid, NULL, key_size, &params);
}
*/
import "C"

import (
	"encoding/binary"
	"errors"
	"fmt"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// library serialises the calls into libcryptsetup. Contexts are apart, but the
// library and libdevmapper below it keep state for the whole process: the use
// count of the control descriptor, the context that messages go to, the queue of
// device nodes. What is slow happens outside: reading headers, looking for data,
// writing. The guard caps the key derivation at 1000 rounds of PBKDF2, so that
// no header makes a holder of the lock spin.
var library sync.Mutex

var silence = sync.OnceFunc(func() { C.ka_silence() })

// session is one libcryptsetup context. It is used by one goroutine, inside
// withSession.
type session struct {
	cd  *C.struct_crypt_device
	log *C.struct_ka_log
}

// withSession runs f with a context for a header and the device that its data
// is on. data may be empty, and so may header: the context then reaches active
// mappings only.
//
// f runs on an OS thread of its own. libcryptsetup hands the volume key to
// dm-crypt through the calling thread's keyring, which is cleared before the
// lock is released and ends with the thread.
func withSession(header, data string, f func(*session) error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		done <- session{}.run(header, data, f)
	}()
	return <-done
}

func (s session) run(header, data string, f func(*session) error) error {
	library.Lock()
	defer library.Unlock()
	defer clearThreadKeyring()
	silence()
	s.log = (*C.struct_ka_log)(C.calloc(1, C.sizeof_struct_ka_log))
	defer C.free(unsafe.Pointer(s.log))
	cHeader, freeHeader := optionalString(header)
	defer freeHeader()
	cData, freeData := optionalString(data)
	defer freeData()
	if r := C.crypt_init_data_device(&s.cd, cHeader, cData); r < 0 {
		return s.failed("open device", r)
	}
	defer C.crypt_free(s.cd)
	C.ka_listen(s.cd, s.log)
	return f(&s)
}

// optionalString is nil in C for a string that is empty in Go. Only paths and
// names go this way; keys never become strings.
func optionalString(s string) (*C.char, func()) {
	if s == "" {
		return nil, func() {}
	}
	c := C.CString(s)
	return c, func() { C.free(unsafe.Pointer(c)) }
}

// clearThreadKeyring drops the volume key that an activation left in the
// thread's keyring. dm-crypt has its own copy by then. Revoking frees the key's
// content; unlinked only, it would wait for the kernel's garbage collector. Asking
// for the keyring's ID without creating it keeps threads that never had one as
// they are.
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

// load reads the metadata from the header, and makes sure that libcryptsetup
// reads what the guard read.
func (s *session) load(uuid string) error {
	kind := C.CString("LUKS2")
	defer C.free(unsafe.Pointer(kind))
	if r := C.crypt_load(s.cd, kind, nil); r < 0 {
		return s.failed("load header", r)
	}
	if got := C.GoString(C.crypt_get_uuid(s.cd)); got != uuid {
		return fmt.Errorf("%w: libcryptsetup reads the UUID %.40q", ErrVolumeMismatch, got)
	}
	return nil
}

// format writes metadata with a fresh volume key, which libcryptsetup makes and
// keeps in the context, and no keyslot.
func (s *session) format(uuid string) error {
	cCipher, cMode, cUUID := C.CString(cipherName), C.CString(cipherMode), C.CString(uuid)
	defer C.free(unsafe.Pointer(cCipher))
	defer C.free(unsafe.Pointer(cMode))
	defer C.free(unsafe.Pointer(cUUID))
	if r := C.ka_format(s.cd, cCipher, cMode, cUUID, volumeKeySize, dataSectorSize,
		kdfIterations, dataOffset/sectorSize); r < 0 {
		return s.failed("format header", r)
	}
	return nil
}

// addKeyslot puts the volume key of the context into keyslot 0 under the DEK.
func (s *session) addKeyslot(dek *secret.Bytes) error {
	return dek.Use(func(key []byte) error {
		if r := C.crypt_keyslot_add_by_volume_key(s.cd, 0, nil, 0, charPtr(key), C.size_t(len(key))); r < 0 {
			return s.failed("add keyslot", r)
		}
		return nil
	})
}

// unlock opens keyslot 0 with the DEK, and, if name is not empty, activates the
// volume under that name.
func (s *session) unlock(name string, dek *secret.Bytes, flags activation) error {
	cName, free := optionalString(name)
	defer free()
	var cFlags C.uint32_t
	if name != "" { // without a name, the keyring flag would leave the volume key there
		cFlags = flags.c()
	}
	return dek.Use(func(key []byte) error {
		r := C.crypt_activate_by_passphrase(s.cd, cName, 0, charPtr(key), C.size_t(len(key)), cFlags)
		switch {
		case r >= 0:
			return nil
		case r == -C.int(unix.EPERM):
			return ErrWrongKey
		case r == -C.int(unix.EEXIST):
			return fmt.Errorf("%w: %s", ErrNameTaken, name)
		case r == -C.int(unix.EBUSY):
			return fmt.Errorf("%w: %w", ErrDeviceBusy, s.failed("activate", r))
		default:
			return s.failed("activate", r)
		}
	})
}

// deactivate removes a mapping.
func (s *session) deactivate(name string) error {
	cName, free := optionalString(name)
	defer free()
	switch r := C.crypt_deactivate(s.cd, cName); {
	case r >= 0:
		return nil
	case r == -C.int(unix.EBUSY):
		return fmt.Errorf("%w: %s is in use", ErrDeviceBusy, name)
	case r == -C.int(unix.ENODEV):
		return fmt.Errorf("%w: %s", ErrNotActive, name)
	default:
		return s.failed("deactivate", r)
	}
}

// activation is how a volume is mapped.
type activation struct {
	readOnly, discards, workqueues bool
}

func (a activation) c() C.uint32_t {
	flags := C.uint32_t(C.CRYPT_ACTIVATE_KEYRING_KEY)
	if a.readOnly {
		flags |= C.CRYPT_ACTIVATE_READONLY
	}
	if a.discards {
		flags |= C.CRYPT_ACTIVATE_ALLOW_DISCARDS
	}
	if !a.workqueues {
		flags |= C.CRYPT_ACTIVATE_NO_READ_WORKQUEUE | C.CRYPT_ACTIVATE_NO_WRITE_WORKQUEUE
	}
	return flags
}

// failed turns a negative errno and the messages that came with it into an
// error, and forgets the messages.
func (s *session) failed(what string, r C.int) error {
	said := strings.Join(strings.Fields(C.GoStringN(&s.log.text[0], C.int(s.log.len))), " ")
	s.log.len = 0
	err := fmt.Errorf("%w: %s: %w", ErrLibrary, what, syscall.Errno(-r))
	if said = strings.TrimSuffix(said, "."); said != "" {
		err = fmt.Errorf("%w (%s)", err, said)
	}
	if errors.Is(err, unix.EIO) {
		err = fmt.Errorf("%w: %w", ErrIO, err)
	}
	return err
}

// charPtr points into locked memory. The bytes are not copied on this side.
func charPtr(key []byte) *C.char { return (*C.char)(unsafe.Pointer(unsafe.SliceData(key))) }
