// Package image copies the image that a new volume begins with: a measured, read-only
// root, whose copy becomes the machine's own.
//
// An image that lies on the host's disk is worth what proves it. Either the kernel
// checks each block as it is read (a dm-verity mapping with the root hash that is
// expected), or its SHA-256 is compared when all of it was copied, and before anybody
// may use the copy.
package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/luks"
)

// Proof is what an image has to be. Exactly one field is set.
type Proof struct {
	SHA256   string // of all of it, in lower-case hex
	RootHash string // of the dm-verity mapping that it is read from, in lower-case hex
}

// ErrMismatch means that an image is not the one that was meant.
var ErrMismatch = errors.New("not the image that was meant")

// ErrTooLarge means that an image does not fit.
var ErrTooLarge = errors.New("the image is larger than the volume")

// Source is an image to copy from.
type Source struct {
	Bytes int64

	f    *os.File
	want string // SHA-256; empty where the kernel checks
}

// Open opens an image, and reads none of it.
func Open(path string, p Proof) (*Source, error) {
	// O_NONBLOCK: a pipe that somebody put there must not hold up the boot.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, failure.New(failure.NotFound, fmt.Errorf("image: %w", err), "is from right, and is what it names there?")
	}
	s := &Source{f: f, want: p.SHA256}
	if err := s.look(p); err != nil {
		return nil, failure.New(failure.Tampered, fmt.Errorf("image %s: %w", path, errors.Join(err, f.Close())), "the copy of an image begins with one that is proved: compare from in the configuration with it")
	}
	return s, nil
}

// look finds out what was opened: by its descriptor, since what lies at a path may
// change.
func (s *Source) look(p Proof) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(s.f.Fd()), &st); err != nil {
		return err
	}
	block := st.Mode&unix.S_IFMT == unix.S_IFBLK
	switch {
	case (p.SHA256 == "") == (p.RootHash == ""):
		return fmt.Errorf("%w: it needs either a SHA-256 or a root hash", ErrMismatch)
	case !block && st.Mode&unix.S_IFMT != unix.S_IFREG:
		return fmt.Errorf("%w: neither a file nor a block device", ErrMismatch)
	case p.RootHash == "":
		size, err := s.f.Seek(0, io.SeekEnd)
		s.Bytes = size
		return err
	case !block:
		return fmt.Errorf("%w: a root hash is of a dm-verity mapping, and this is a file", ErrMismatch)
	}
	v, err := luks.ReadVerity(luks.DevNum{Major: unix.Major(st.Rdev), Minor: unix.Minor(st.Rdev)})
	switch {
	case err != nil:
		return fmt.Errorf("%w: %w", ErrMismatch, err)
	case v.RootHash != p.RootHash:
		return fmt.Errorf("%w: its root hash is %s, expected %s", ErrMismatch, v.RootHash, p.RootHash)
	}
	s.Bytes = v.Bytes
	return nil
}

// Fits says whether the image fits into that many bytes.
func (s *Source) Fits(bytes int64) error {
	if s.Bytes > bytes {
		return failure.New(failure.Configuration, fmt.Errorf("%w: %d bytes, and the volume has %d", ErrTooLarge, s.Bytes, bytes), "grow the disk")
	}
	return nil
}

const chunk = 1 << 20

// CopyTo writes the image to the beginning of a device, durably. The copy is worth
// nothing before it returns nil: the end of an image may show that it is another.
func (s *Source) CopyTo(ctx context.Context, device string) error {
	to, err := os.OpenFile(device, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	size, err := to.Seek(0, io.SeekEnd)
	if err == nil {
		err = s.Fits(size)
	}
	if err == nil {
		err = s.copy(ctx, to)
	}
	if err == nil {
		err = to.Sync()
	}
	if err := errors.Join(err, to.Close()); err != nil {
		return fmt.Errorf("copy the image: %w", err)
	}
	return nil
}

func (s *Source) copy(ctx context.Context, to io.WriterAt) error {
	var sum hash.Hash
	if s.want != "" {
		sum = sha256.New()
	}
	buf := make([]byte, chunk)
	for at := int64(0); at < s.Bytes; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		part := buf[:min(chunk, s.Bytes-at)]
		// An image that became shorter is an error, and one that grew is not the one
		// whose size was looked at: its digest says so.
		if _, err := s.f.ReadAt(part, at); err != nil {
			return failure.New(failure.Tampered, fmt.Errorf("read it at byte %d: %w", at, err), "dm-verity refuses blocks that are not the image's; the kernel's log names them")
		}
		if sum != nil {
			sum.Write(part)
		}
		if _, err := to.WriteAt(part, at); err != nil {
			return err
		}
		at += int64(len(part))
	}
	if sum == nil {
		return nil
	}
	if got := hex.EncodeToString(sum.Sum(nil)); got != s.want {
		return failure.New(failure.Tampered, fmt.Errorf("%w: its SHA-256 is %s, expected %s", ErrMismatch, got, s.want), "nothing of it is used; write the right image, and try again")
	}
	return nil
}

// Close closes the image.
func (s *Source) Close() error { return s.f.Close() }
