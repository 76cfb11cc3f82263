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
	const char *uuid, const char *key, size_t key_size, unsigned sector_size,
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
	return crypt_format(cd, CRYPT_LUKS2, cipher, mode, uuid, key, key_size, &params);
}
*/
import "C"

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/secret"
)

// library serialises the calls into libcryptsetup. Contexts are apart, but the
// library keeps state for the whole process. It sees nothing but headers in memory,
// so that no disk can keep a holder of the lock waiting; and the guard caps the key
// derivation at 1000 rounds of PBKDF2, so that no header makes it spin.
var library sync.Mutex

var silence = sync.OnceFunc(func() { C.ka_silence() })

// session is one libcryptsetup context. It is used inside withSession alone.
type session struct {
	cd  *C.struct_crypt_device
	log *C.struct_ka_log
}

// withSession runs f with a context for the header at path, which lies in memory.
func withSession(path string, f func(*session) error) error {
	library.Lock()
	defer library.Unlock()
	silence()
	var s session
	s.log = (*C.struct_ka_log)(C.calloc(1, C.sizeof_struct_ka_log))
	defer C.free(unsafe.Pointer(s.log))
	cPath := C.CString(path) // only paths and names become strings, never keys
	defer C.free(unsafe.Pointer(cPath))
	if r := C.crypt_init_data_device(&s.cd, cPath, nil); r < 0 {
		return s.failed("open header", r)
	}
	defer C.crypt_free(s.cd)
	C.ka_listen(s.cd, s.log)
	return f(&s)
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

// format writes metadata for a volume key, which libcryptsetup keeps in the context, and
// no keyslot. Without a key libcryptsetup makes one.
func (s *session) format(uuid string, vk *secret.Bytes) error {
	cCipher, cMode, cUUID := C.CString(cipherName), C.CString(cipherMode), C.CString(uuid)
	defer C.free(unsafe.Pointer(cCipher))
	defer C.free(unsafe.Pointer(cMode))
	defer C.free(unsafe.Pointer(cUUID))
	format := func(key *C.char) error {
		if r := C.ka_format(s.cd, cCipher, cMode, cUUID, key, volumeKeySize, dataSectorSize,
			kdfIterations, dataOffset/sectorSize); r < 0 {
			return s.failed("format header", r)
		}
		return nil
	}
	if vk == nil {
		return format(nil)
	}
	return vk.Use(func(key []byte) error { return format(charPtr(key)) })
}

// addKeyslot puts the volume key of the context into keyslot 0 under the DEK.
func (s *session) addKeyslot(dek *Key) error {
	return dek.Use(func(key []byte) error {
		if r := C.crypt_keyslot_add_by_volume_key(s.cd, 0, nil, 0, charPtr(key), C.size_t(len(key))); r < 0 {
			return s.failed("add keyslot", r)
		}
		return nil
	})
}

// addUnboundKeyslot puts a volume key into keyslot 0 under the DEK, bound to no segment:
// libcryptsetup makes a header with integrity only where it can map the device at once.
// bindKeyslot does the rest.
func (s *session) addUnboundKeyslot(vk *secret.Bytes, dek *Key) error {
	return vk.Use(func(volume []byte) error {
		return dek.Use(func(key []byte) error {
			r := C.crypt_keyslot_add_by_key(s.cd, 0, charPtr(volume), C.size_t(len(volume)),
				charPtr(key), C.size_t(len(key)), C.CRYPT_VOLUME_KEY_NO_SEGMENT)
			if r < 0 {
				return s.failed("add keyslot", r)
			}
			return nil
		})
	})
}

// test opens keyslot 0 with the DEK and maps nothing.
func (s *session) test(dek *Key) error {
	return dek.Use(func(key []byte) error {
		r := C.crypt_activate_by_passphrase(s.cd, nil, 0, charPtr(key), C.size_t(len(key)), 0)
		return s.unlocked(r)
	})
}

// volumeKey opens keyslot 0 with the DEK and returns the key of that size that it
// holds.
func (s *session) volumeKey(bytes int, dek *Key) (*secret.Bytes, error) {
	vk, err := secret.New(bytes)
	if err != nil {
		return nil, err
	}
	err = vk.Use(func(into []byte) error {
		return dek.Use(func(key []byte) error {
			size := C.size_t(len(into))
			r := C.crypt_volume_key_get(s.cd, 0, charPtr(into), &size, charPtr(key), C.size_t(len(key)))
			if r >= 0 && int(size) != bytes {
				return fmt.Errorf("%w: volume key has %d bytes", ErrLibrary, size)
			}
			return s.unlocked(r)
		})
	})
	if err != nil {
		vk.Close()
		return nil, err
	}
	return vk, nil
}

func (s *session) unlocked(r C.int) error {
	switch {
	case r >= 0:
		return nil
	case r == -C.int(unix.EPERM):
		return ErrWrongKey
	default:
		return s.failed("open keyslot", r)
	}
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
