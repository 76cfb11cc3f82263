// Package storage keeps the key service's records. Nothing in it is secret:
// wrapped keys and MACed records, which storage may lose or refuse but cannot
// change unnoticed.
//
// Every write is a compare-and-swap on a version that the backend gives out, so
// that any number of key services can share one storage. One package below this
// one is one backend; each passes the suite of storage/storagetest.
package storage

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
)

// MaxObject bounds an object in bytes.
const MaxObject = 64 << 10

var (
	// ErrNotFound means that there is no object of that name.
	ErrNotFound = errors.New("object not found")
	// ErrConflict means that the object is not in the expected version. Nothing was
	// written.
	ErrConflict = errors.New("object was changed by somebody else")
	// ErrName means that the name is not one that every backend can hold.
	ErrName = errors.New("object name is not allowed")
	// ErrTooLarge means that the object is larger than MaxObject.
	ErrTooLarge = errors.New("object is too large")
	// ErrCorrupt means that what the backend holds is not what was written.
	ErrCorrupt = errors.New("object is corrupt")
	// ErrDenied means that the service knows who asks and does not allow it. The text
	// after it names the permission, in the words of that service.
	ErrDenied = errors.New("missing permission")
	// ErrCredentials means that the service does not know who asks: there are no
	// credentials, or they are wrong or have expired.
	ErrCredentials = errors.New("credentials are not accepted")
	// ErrNoBucket means that the bucket, container or folder that holds the objects is
	// not there. It says nothing about any object.
	ErrNoBucket = errors.New("there is no such bucket")
	// ErrUnavailable means that the service cannot be reached, or does not work at the
	// moment. Trying again later may help.
	ErrUnavailable = errors.New("storage is unavailable")
	// ErrKept means that the service keeps earlier versions of an object that cannot be
	// destroyed from here. The text after it says until when, where that is known.
	ErrKept = errors.New("earlier versions are kept")
	// ErrThrottled means that the service still throttled us after the last retry.
	ErrThrottled = fmt.Errorf("%w: too many requests", ErrUnavailable)
)

// Version identifies one state of one object. A version is never reused, not even
// after the object is deleted. Absent is the version of an object that does not exist.
type Version string

// Absent is expected of an object that is to be created.
const Absent Version = ""

// Storage holds small objects by name. It is safe for concurrent use, also by
// several processes.
//
// Every method returns [ErrName] or [ErrTooLarge] for what no backend holds;
// [ErrNoBucket] if what holds the objects is gone; [ErrUnavailable], [ErrThrottled],
// [ErrDenied] or [ErrCredentials] where a service does not do what it is asked; and
// context.Canceled if ctx is cancelled.
type Storage interface {
	// Get returns an object and its version. [ErrNotFound] if there is none;
	// every other error leaves open whether there is one.
	Get(ctx context.Context, name string) ([]byte, Version, error)
	// Put writes an object if it is in the expected version, else
	// [ErrConflict]. When it returns nil the object is durable. Any other
	// error leaves open whether it was written: read it back.
	Put(ctx context.Context, name string, data []byte, expect Version) (Version, error)
	// List returns, in byte order, at most limit names that begin with prefix
	// and come after the name after.
	List(ctx context.Context, prefix, after string, limit int) ([]string, error)
}

// Deleter is implemented by backends that can delete.
type Deleter interface {
	// Delete removes an object that is in the expected version.
	Delete(ctx context.Context, name string, expect Version) error
}

// Purger is implemented by backends whose service may keep what an object was before.
type Purger interface {
	// Purge destroys all versions of an object but the present one, and returns how many
	// there were. [ErrKept] if some are left, as far as the service shows them.
	Purge(ctx context.Context, name string) (int, error)
}

// Purge is [Purger.Purge] where s has that, and nothing elsewhere.
func Purge(ctx context.Context, s Storage, name string) (int, error) {
	if p, ok := s.(Purger); ok {
		return p.Purge(ctx, name)
	}
	return 0, nil
}

var namePattern = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)*$`)

// CheckName returns an error that wraps [ErrName] unless name consists of 1 to
// 255 bytes of segments of letters, digits, dots, dashes and underscores,
// joined by slashes, each beginning with a letter or digit.
func CheckName(name string) error {
	if len(name) > 255 || !namePattern.MatchString(name) || strings.Contains(name, "..") {
		return fmt.Errorf("%w: %q", ErrName, name[:min(len(name), 64)])
	}
	return nil
}

// CheckPut checks a name and an object.
func CheckPut(name string, data []byte) error {
	if len(data) > MaxObject {
		return fmt.Errorf("%w: %d bytes, at most %d", ErrTooLarge, len(data), MaxObject)
	}
	return CheckName(name)
}
