package lab

import (
	"bytes"
	"context"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

func TestArchiveHasTheSameBytesInWhateverOrderItWasFilled(t *testing.T) {
	add := []func(a *archive){
		func(a *archive) { a.add("/init", 0o755, []byte("#!/bin/sh\n")) },
		func(a *archive) { a.add("/bin/sh", fs.ModeSymlink, []byte("busybox")) },
		func(a *archive) { a.add("/a/b/c", 0o600, []byte("odd")) },
		func(a *archive) { a.dir("/proc") },
	}
	forward, backward := newArchive(), newArchive()
	for i := range add {
		add[i](forward)
		add[len(add)-1-i](backward)
	}
	if !bytes.Equal(forward.bytes(), backward.bytes()) {
		t.Fatal("the order of adding shows in the archive")
	}
}

// The reader of another maker is the judge of the format.
func TestArchiveIsReadByCpio(t *testing.T) {
	a := newArchive()
	a.add("/etc/secret", 0o600, []byte("content of a file"))
	a.add("/bin/sh", fs.ModeSymlink, []byte("busybox"))
	a.add("/etc/empty", 0o644, nil)
	dir := t.TempDir()
	list, err := invocation{stdin: a.bytes()}.run(context.Background(), "cpio", "-tv", "--quiet")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"drwxr-xr-x   2 root", "-rw-------   1 root     root           17", "bin/sh -> busybox", "-rw-r--r--   1 root     root            0"} {
		if !strings.Contains(string(list), want) {
			t.Errorf("cpio does not list %q:\n%s", want, list)
		}
	}
	if _, err := (invocation{stdin: a.bytes(), dir: dir}).run(context.Background(), "cpio", "-id", "--quiet"); err != nil {
		t.Fatal(err)
	}
	if count, err := SearchFile(filepath.Join(dir, "etc/secret"), []byte("content of a file")); err != nil || count != 1 {
		t.Errorf("extracted file: %d, %v", count, err)
	}
}

func TestArchiveKeepsTheLastOfTwoFilesOfOneName(t *testing.T) {
	a := newArchive()
	a.add("/etc/x", 0o644, []byte("first"))
	a.add("etc/./x", 0o644, []byte("second"))
	if got := string(a.entries["etc/x"].data); got != "second" {
		t.Errorf("got %q", got)
	}
}
