package mount

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is a line of mountinfo.
type Entry struct {
	Point  string
	Device uint64 // as stat(2) shows it; not that of a disk for btrfs
	Type   string
	Source string
	// ReadOnly is of this mount, not of the filesystem.
	ReadOnly bool
}

// Is reports whether the mount is of a block device.
func (e *Entry) Is(device uint64) bool {
	if e.Device == device {
		return true
	}
	// btrfs has a number of its own for each mount; its source is a node.
	return e.Type == "btrfs" && strings.HasPrefix(e.Source, "/") && Number(e.Source) == device
}

// maxTable bounds mountinfo in bytes; a busy node has a few hundred KiB.
const maxTable = 64 << 20

// Table returns what is mounted in this mount namespace.
func Table() ([]Entry, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return parseTable(f)
}

// At returns what is mounted on a canonical path, the topmost if several are, or
// nil.
func At(path string) (*Entry, error) {
	all, err := Table()
	if err != nil {
		return nil, err
	}
	for i := len(all) - 1; i >= 0; i-- {
		if all[i].Point == path {
			return &all[i], nil
		}
	}
	return nil, nil
}

var errMountinfo = errors.New("mountinfo is not in its form")

func parseTable(r io.Reader) ([]Entry, error) {
	scan := bufio.NewScanner(io.LimitReader(r, maxTable))
	scan.Buffer(nil, 1<<20)
	var out []Entry
	for scan.Scan() {
		e, err := parseLine(scan.Bytes())
		if err != nil {
			return nil, err
		}
		out = append(out, e)
	}
	return out, scan.Err()
}

// parseLine reads one line, see proc_pid_mountinfo(5).
func parseLine(line []byte) (Entry, error) {
	head, tail, ok := bytes.Cut(line, []byte(" - "))
	fields, rest := bytes.Fields(head), bytes.Fields(tail)
	if !ok || len(fields) < 6 || len(rest) < 2 {
		return Entry{}, fmt.Errorf("%w: %.80q", errMountinfo, line)
	}
	var major, minor uint32
	if _, err := fmt.Sscanf(string(fields[2]), "%d:%d", &major, &minor); err != nil {
		return Entry{}, fmt.Errorf("%w: %.80q", errMountinfo, line)
	}
	return Entry{
		Point: unescape(string(fields[4])), Device: unix.Mkdev(major, minor), Type: string(rest[0]), Source: unescape(string(rest[1])),
		ReadOnly: slices.Contains(strings.Split(string(fields[5]), ","), "ro"),
	}, nil
}

var escapes = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`, `\043`, "#")

func unescape(s string) string { return escapes.Replace(s) }
