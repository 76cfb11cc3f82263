package confine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/landlock-lsm/go-landlock/landlock"
	access "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Paths are the files of a role. What is empty is left out, and so is what does not exist
// in a folder that does not exist.
type Paths struct {
	// Read are files and folders that are read. With a file goes its folder, and with a
	// link what it leads to: a file that is replaced, comes late, or is named later beside
	// an old one, is read as well. A file that lies in / lets all be read.
	Read []string
	// Write are folders in which files are made, replaced and removed.
	Write []string
	// Sockets are removed in the end.
	Sockets []string
	// Devices are read, written and given commands.
	Devices []string
	// Evidence: the role attests itself, with what the kernel has for it.
	Evidence bool
	// Anything may be read, since a cloud's library decides where it looks.
	Anything bool
}

// system is what any program reads: itself, libraries that are loaded late, settings of
// name resolution, the roots of TLS wherever distributions put them, and what the kernel
// says. What else lies in these folders is for the permissions of files.
var system = []string{
	"/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/usr", "/etc", "/opt", "/nix", "/gnu",
	"/dev", "/proc", "/sys", "/run", "/var/lib/ca-certificates",
}

// The kernel's sources of evidence.
var (
	evidenceDevices = []string{"/dev/tpmrm0", "/dev/tpm0", "/dev/sev-guest", "/dev/tdx_guest"}
	evidenceFolder  = "/sys/kernel/config/tsm" // a report is a folder there that one makes
)

// Files takes from the process all files but those, and signals to other processes than
// its own where the kernel can do that. It returns the kernel's version of landlock: 0,
// having done nothing, if it has none.
func Files(p Paths) (version int, err error) {
	v, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
	if errno != 0 { // of a kernel that has no landlock, or was started without it
		return 0, nil
	}
	// The domain is given to one thread after the other, which are listed there. Without
	// that list the library would end the process.
	if _, err := os.ReadDir("/proc/self/task"); err != nil {
		return 0, fmt.Errorf("%w: landlock: %w (hint: mount /proc)", ErrRefused, err)
	}
	// Of newer versions only what this is written for.
	config := landlock.Config{HandledAccessFS: landlock.V5.HandledAccessFS, Scoped: access.ScopeSignal}
	if err := config.BestEffort().Restrict(p.rules()...); err != nil {
		return 0, fmt.Errorf("%w: landlock: %w", ErrRefused, err)
	}
	return int(v), nil
}

func (p Paths) rules() []landlock.Rule {
	// Go's own words for other roots than the system's, which it reads when they are needed.
	p.Read = slices.Concat(p.Read, []string{os.Getenv("SSL_CERT_FILE")}, filepath.SplitList(os.Getenv("SSL_CERT_DIR")))
	read, write, devices := slices.Concat(system, folders(p.Read)), folders(p.Write), append([]string{"/dev/null"}, p.Devices...)
	if p.Anything {
		read = []string{"/"}
	}
	if p.Evidence {
		write, devices = append(write, evidenceFolder), append(devices, evidenceDevices...)
	}
	var sockets []string
	for _, path := range p.Sockets {
		sockets = append(sockets, filepath.Dir(path))
	}
	return []landlock.Rule{
		landlock.RODirs(read...).IgnoreIfMissing(),
		landlock.RWDirs(write...).IgnoreIfMissing(),
		landlock.PathAccess(access.AccessFSRemoveFile, folders(sockets)...),
		landlock.RWFiles(devices...).WithIoctlDev().IgnoreIfMissing(),
	}
}

// folders are those of paths: themselves, or of files both that in which they are named
// and that in which they really are. Of a file that is not there yet it is the folder in
// which it will be, if there is that one.
func folders(paths []string) (out []string) {
	for _, path := range paths {
		if path == "" {
			continue
		}
		real, err := filepath.EvalSymlinks(path)
		if errors.Is(err, fs.ErrNotExist) {
			real, err = filepath.EvalSymlinks(filepath.Dir(path))
		}
		if err != nil {
			continue // this process cannot use it either
		}
		if st, err := os.Stat(real); err == nil && st.IsDir() {
			out = append(out, real)
			continue
		}
		out = append(out, filepath.Dir(path), filepath.Dir(real))
	}
	return out
}
