package mount

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/failure"
)

// Place is a folder that was reached without following anybody's links.
type Place struct {
	Path string // canonical
	fd   int
}

// Close forgets the folder.
func (p *Place) Close() error { return unix.Close(p.fd) }

// descriptor leads to this very folder, whatever its path leads to by now.
func (p *Place) descriptor() string { return fmt.Sprintf("/proc/self/fd/%d", p.fd) }

// maxLinks bounds how many links lie on one path.
const maxLinks = 8

// ErrLink means that a link on the path is not one that only root can have made.
var ErrLink = errors.New("path leads through a link that is not safe")

// Find reaches a folder component by component. Links that root made in folders
// that only root can write, such as /var/run, are resolved; any other is refused.
// With create, folders that are missing are made with mode 0755.
func Find(path string, create bool) (*Place, error) {
	todo := components(path)
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	at := &Place{Path: "/", fd: fd}
	stack := []*Place{}
	defer func() {
		for _, p := range stack {
			_ = p.Close()
		}
	}()
	links := 0
	for len(todo) > 0 {
		name := todo[0]
		todo = todo[1:]
		next, link, err := at.step(name, create)
		switch {
		case err != nil:
			return nil, errors.Join(failure.New(failure.Configuration, fmt.Errorf("mount point %s: %w", path, err), ""), at.Close())
		case link != "":
			if links++; links > maxLinks {
				return nil, errors.Join(failure.Newf(failure.Configuration, "", "mount point %s: more than %d links", path, maxLinks), at.Close())
			}
			todo = append(components(link), todo...)
			if filepath.IsAbs(link) {
				if at, err = at.root(); err != nil {
					return nil, err
				}
			}
		default:
			stack = append(stack, at)
			at = next
		}
	}
	return at, nil
}

func components(path string) []string {
	var out []string
	for _, c := range strings.Split(path, "/") {
		if c != "" && c != "." {
			out = append(out, c)
		}
	}
	return out
}

func (p *Place) root() (*Place, error) {
	fd, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	return &Place{Path: "/", fd: fd}, errors.Join(err, p.Close())
}

// step goes one component down, or returns where a safe link leads.
func (p *Place) step(name string, create bool) (next *Place, link string, err error) {
	fd, err := unix.Openat(p.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) && create {
		if err = p.mkdir(name); err == nil {
			fd, err = unix.Openat(p.fd, name, unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		}
	}
	if err != nil {
		return nil, "", &os.PathError{Op: "open", Path: filepath.Join(p.Path, name), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, "", errors.Join(err, unix.Close(fd))
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		path := filepath.Join(p.Path, name)
		if name == ".." {
			path = filepath.Dir(p.Path)
		}
		return &Place{Path: path, fd: fd}, "", nil
	case unix.S_IFLNK:
		defer unix.Close(fd)
		link, err = p.readLink(name, fd, st.Uid)
		return nil, link, err
	}
	return nil, "", errors.Join(fmt.Errorf("%s is not a folder", filepath.Join(p.Path, name)), unix.Close(fd))
}

// readLink returns where a link leads that nobody but root can have made.
func (p *Place) readLink(name string, fd int, owner uint32) (string, error) {
	var dir unix.Stat_t
	if err := unix.Fstat(p.fd, &dir); err != nil {
		return "", err
	}
	if owner != 0 || dir.Uid != 0 || dir.Mode&0o022 != 0 {
		return "", fmt.Errorf("%w: %s", ErrLink, filepath.Join(p.Path, name))
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	return string(buf[:max(n, 0)]), err
}

// mkdir makes a folder that everybody can pass through, whatever the umask.
func (p *Place) mkdir(name string) error {
	if err := unix.Mkdirat(p.fd, name, 0o755); err != nil {
		return err
	}
	fd, err := unix.Openat(p.fd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	return errors.Join(unix.Fchmod(fd, 0o755), unix.Close(fd))
}

func pointer(p *byte) uintptr { return uintptr(unsafe.Pointer(p)) }
