package lab

import (
	"bytes"
	"fmt"
	"io/fs"
	"path"
	"sort"
	"strings"
)

// archive collects files for an initramfs and writes them in the kernel's newc
// cpio format. The same files give the same bytes, whatever order they were
// added in: names are sorted, inode numbers count up, and owner and times are 0.
type archive struct {
	entries map[string]entry // by clean path without leading slash
}

type entry struct {
	mode uint32 // type and permission bits, as stat(2) has them
	data []byte // of a symlink: its target
}

const (
	typeMask    = 0o170000
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
)

func newArchive() *archive { return &archive{entries: map[string]entry{}} }

// add puts a file, or (mode with fs.ModeSymlink) a link, into the archive,
// together with the directories above it. The last one added under a name wins.
func (a *archive) add(name string, mode fs.FileMode, data []byte) {
	name = cleanName(name)
	a.dir(path.Dir(name))
	if mode&fs.ModeSymlink != 0 {
		a.entries[name] = entry{mode: typeSymlink | 0o777, data: data}
		return
	}
	a.entries[name] = entry{mode: typeRegular | uint32(mode.Perm()), data: data}
}

// dir makes a directory and those above it.
func (a *archive) dir(name string) {
	for name = cleanName(name); name != "." && name != ""; name = path.Dir(name) {
		if _, there := a.entries[name]; !there {
			a.entries[name] = entry{mode: typeDir | 0o755}
		}
	}
}

func cleanName(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

// bytes returns the archive.
func (a *archive) bytes() []byte {
	names := make([]string, 0, len(a.entries))
	for name := range a.entries {
		names = append(names, name)
	}
	// A directory sorts before what is in it, as the kernel needs it.
	sort.Strings(names)
	var out bytes.Buffer
	for i, name := range names {
		writeNewc(&out, i+1, name, a.entries[name])
	}
	writeNewc(&out, 0, "TRAILER!!!", entry{})
	return out.Bytes()
}

func writeNewc(out *bytes.Buffer, inode int, name string, e entry) {
	links := 1
	if e.mode&typeMask == typeDir {
		links = 2
	}
	// Fields: inode, mode, uid, gid, nlink, mtime, size, device (2), rdevice (2),
	// length of the name with its NUL, checksum.
	fmt.Fprintf(out, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x",
		inode, e.mode, 0, 0, links, 0, len(e.data), 0, 0, 0, 0, len(name)+1, 0)
	out.WriteString(name)
	out.WriteByte(0)
	pad4(out)
	out.Write(e.data)
	pad4(out)
}

func pad4(out *bytes.Buffer) {
	for out.Len()%4 != 0 {
		out.WriteByte(0)
	}
}
