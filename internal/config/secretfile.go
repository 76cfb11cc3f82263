package config

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/keyagent/keyagent/internal/secret"
)

// ReadSecretFile reads a file of at most limit bytes into locked memory. See
// [CheckSecretFile] for what it refuses.
func ReadSecretFile(path string, limit int) (*secret.Bytes, error) {
	if err := CheckSecretFile(path); err != nil {
		return nil, err
	}
	return readSecret(path, limit)
}

// ReadPublicFile reads a file of at most limit bytes that holds no secret, such as
// certificates.
func ReadPublicFile(path string, limit int) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, int64(limit)+1))
	if err == nil && len(data) > limit {
		err = fmt.Errorf("%w: %s has more than %d bytes", ErrInvalid, path, limit)
	}
	return data, err
}

// ReadCredential reads a systemd credential of this service, see
// systemd.exec(5), LoadCredential=, of at most limit bytes.
func ReadCredential(name string, limit int) (*secret.Bytes, error) {
	dir := os.Getenv("CREDENTIALS_DIRECTORY")
	if dir == "" {
		return nil, fmt.Errorf("this process has no credentials (hint: LoadCredential=%s:PATH in the unit)", name)
	}
	if filepath.Base(name) != name {
		return nil, errors.New("a credential's name has no slash")
	}
	return readSecret(filepath.Join(dir, name), limit)
}

func readSecret(path string, limit int) (*secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	s, err := secret.Read(f, limit)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return s, nil
}

// WriteSecretFile writes a new file that its owner alone can read. A file that
// exists is an error: nothing is ever overwritten. The file appears with all of
// its content, or not at all.
func WriteSecretFile(path string, s *secret.Bytes) error {
	dir := filepath.Dir(path)
	// Left behind only by a crash.
	f, err := os.CreateTemp(dir, ".new-secret-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	err = s.Use(func(b []byte) error { _, err := f.Write(b); return err })
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	// Unlike a rename, a link fails where a file is.
	if err := os.Link(f.Name(), path); errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", path, fs.ErrExist) // without the other name
	} else if err != nil {
		return err
	}
	return SyncDir(dir)
}

// ReplaceFile writes a file that its owner alone can read, in the place of what has its name.
// After a crash there is the one or the other.
func ReplaceFile(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, ".new-*")
	if err != nil {
		return err
	}
	defer os.Remove(f.Name()) // left behind only by a crash
	_, err = f.Write(data)
	if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// SyncDir has the names in a folder on the disk when it returns.
func SyncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// CheckSecretFile refuses a file of secrets that others may read.
func CheckSecretFile(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("%w: %s is not a regular file", ErrInvalid, path)
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o, others can read or write the secret in it (hint: chmod 600 %s)",
			ErrInvalid, path, st.Mode().Perm(), path)
	}
	return checkOwner(path, st)
}

func checkOwner(path string, st fs.FileInfo) error {
	uid, ok := ownerOf(st)
	if ok && uid != 0 && uid != os.Geteuid() {
		return fmt.Errorf("%w: %s belongs to uid %d (hint: chown it to root or to the service's user)", ErrInvalid, path, uid)
	}
	return nil
}
