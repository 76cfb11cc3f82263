package endorsement

import (
	"bytes"
	"cmp"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"syscall"

	"github.com/keyagent/keyagent/internal/pattern"
)

// A file holds one document:
//
//	"KAENDOR1"  magic
//	uint32      length of the body, big endian
//	uint32      length of the chain
//	body, chain
//	SHA-256 of all of the above, which finds damage and proves nothing
//
// Someone who can write here can make documents stale or missing, and nothing else:
// what is read is verified by those who use it.
const (
	magic     = "KAENDOR1"
	head      = len(magic) + 8
	maxFile   = head + 2*MaxDocument + sha256.Size
	extension = ".doc"
	temporary = ".tmp-"
)

var nameForm = pattern.New(`^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$`)

// errName is a fault of the caller's, and no document's.
var errName = errors.New("name of an endorsement is not letters, digits, dots and dashes")

func checkName(name string) error {
	if !nameForm.MatchString(name) {
		return fmt.Errorf("%w: %q", errName, name)
	}
	return nil
}

// store is the part of a cache that outlives the process. Nothing in it can lead
// out of its directory.
type store struct {
	root *os.Root
	max  int
}

func openStore(dir string, limit int) (*store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	s := &store{root, limit}
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return nil, errors.Join(err, root.Close())
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), temporary) {
			_ = root.Remove(e.Name()) // of a process that died
		}
	}
	return s, nil
}

// read returns a stored document. Whatever is not one is a miss.
func (s *store) read(name string) (Document, bool) {
	// Without O_NONBLOCK a pipe in the document's place would hold everybody up.
	f, err := s.root.OpenFile(name+extension, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return Document{}, false
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || !info.Mode().IsRegular() || info.Size() > int64(maxFile) {
		return Document{}, false
	}
	data, err := io.ReadAll(io.LimitReader(f, int64(maxFile)+1))
	if err != nil {
		return Document{}, false
	}
	return decode(data)
}

// write replaces a document at once or not at all.
func (s *store) write(name string, d Document) error {
	tmp := temporary + rand.Text()
	f, err := s.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	_, err = f.Write(encode(d))
	if err == nil {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = s.root.Rename(tmp, name+extension)
	}
	if err != nil {
		_ = s.root.Remove(tmp)
		return err
	}
	if dir, err := s.root.Open("."); err == nil {
		_ = dir.Sync()
		_ = dir.Close()
	}
	return s.prune(name)
}

// prune removes the oldest documents above the limit, never keep.
func (s *store) prune(keep string) error {
	entries, err := fs.ReadDir(s.root.FS(), ".")
	if err != nil {
		return err
	}
	var files []fs.FileInfo
	for _, e := range entries {
		if info, err := e.Info(); err == nil && strings.HasSuffix(e.Name(), extension) && e.Name() != keep+extension {
			files = append(files, info)
		}
	}
	slices.SortFunc(files, func(a, b fs.FileInfo) int { return cmp.Compare(a.ModTime().UnixNano(), b.ModTime().UnixNano()) })
	for _, f := range files[:max(0, len(files)+1-s.max)] {
		if err := s.root.Remove(f.Name()); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

func encode(d Document) []byte {
	out := []byte(magic)
	out = binary.BigEndian.AppendUint32(out, uint32(len(d.Body)))
	out = binary.BigEndian.AppendUint32(out, uint32(len(d.Chain)))
	out = append(append(out, d.Body...), d.Chain...)
	sum := sha256.Sum256(out)
	return append(out, sum[:]...)
}

func decode(data []byte) (Document, bool) {
	if len(data) < head+sha256.Size || string(data[:len(magic)]) != magic {
		return Document{}, false
	}
	body := int64(binary.BigEndian.Uint32(data[len(magic):]))
	chain := int64(binary.BigEndian.Uint32(data[len(magic)+4:]))
	end := int64(head) + body + chain
	if body == 0 || body > MaxDocument || chain > MaxDocument || end+sha256.Size != int64(len(data)) {
		return Document{}, false
	}
	if sum := sha256.Sum256(data[:end]); !bytes.Equal(sum[:], data[end:]) {
		return Document{}, false
	}
	d := Document{Body: data[head : int64(head)+body]}
	if chain > 0 {
		d.Chain = data[int64(head)+body : end]
	}
	return d, true
}
