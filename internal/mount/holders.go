package mount

import (
	"bufio"
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Stacked names the devices that lie on a block device: mappings by their names.
func Stacked(device uint64) []string {
	names, _ := filepath.Glob(fmt.Sprintf("/sys/dev/block/%d:%d/holders/*", unix.Major(device), unix.Minor(device)))
	for i, n := range names {
		name, err := os.ReadFile(n + "/dm/name")
		if names[i] = filepath.Base(n); err == nil {
			names[i] = strings.TrimSpace(string(name))
		}
	}
	return names
}

// maxHolders bounds how many are named.
const maxHolders = 8

// Holders names the processes that use a device or a file on it, as far as this
// process may see them: "pid 123 (postgres)".
func Holders(source Source, target string) []string {
	files := source.Device
	var st unix.Stat_t
	if target != "" && unix.Stat(target, &st) == nil {
		files = st.Dev // not that of the disk for btrfs
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*")
	var out []string
	for _, dir := range dirs {
		if len(out) == maxHolders {
			return append(out, "and others")
		}
		pid, _ := strconv.Atoi(filepath.Base(dir))
		if pid != os.Getpid() && holds(dir, source.Device, files) {
			name, _ := os.ReadFile(dir + "/comm")
			out = append(out, fmt.Sprintf("pid %d (%.32s)", pid, strings.TrimSpace(string(name))))
		}
	}
	return out
}

// holds reports whether a process has something open.
func holds(dir string, device, files uint64) bool {
	open, _ := filepath.Glob(dir + "/fd/[0-9]*")
	for _, path := range slices.Concat([]string{dir + "/cwd", dir + "/root", dir + "/exe"}, open) {
		var st unix.Stat_t
		// Through the link, which leads to the open file itself.
		if unix.Stat(path, &st) != nil {
			continue
		}
		if st.Dev == files || st.Mode&unix.S_IFMT == unix.S_IFBLK && st.Rdev == device {
			return true
		}
	}
	return maps(dir, files)
}

// maps reports whether a process has a file of the device in its memory.
func maps(dir string, files uint64) bool {
	data, err := os.ReadFile(dir + "/maps")
	if err != nil {
		return false
	}
	want := fmt.Sprintf("%02x:%02x", unix.Major(files), unix.Minor(files))
	scan := bufio.NewScanner(bytes.NewReader(data))
	for scan.Scan() {
		if f := strings.Fields(scan.Text()); len(f) > 5 && f[3] == want {
			return true
		}
	}
	return false
}
