package lab

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"
)

func TestInjectedFilesReplaceFilesAndFollowLinkedFolders(t *testing.T) {
	dir := t.TempDir()
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "image")
	for _, f := range []File{
		{Path: "/usr/lib/there", Data: []byte("old")},
		{Path: "/lib", Link: "usr/lib"},
		{Path: "/etc/unit", Link: "/dev/null"},
	} {
		if err := placeFile(tree, f); err != nil {
			t.Fatal(err)
		}
	}
	ctx := t.Context()
	if _, err := run(ctx, "mke2fs", "-q", "-t", "ext4", "-d", tree, image, "4M"); err != nil {
		t.Fatal(err)
	}
	program := bytes.Repeat([]byte("program"), 1000)
	if err := injectFiles(ctx, image, []File{
		{Path: "/lib/there", Data: []byte("new")},
		{Path: "/lib/systemd/system/a.service", Data: []byte("[Unit]")},
		{Path: "/usr/bin/program", Data: program, Mode: 0o755},
		{Path: "/etc/unit", Data: []byte("")},
		{Path: "/etc/wants/a.service", Link: "../a.service"},
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := run(ctx, "e2fsck", "-fn", image); err != nil {
		t.Errorf("the image is damaged: %v", err)
	}
	out := filepath.Join(dir, "out")
	if err := os.Mkdir(out, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := run(ctx, "debugfs", "-R", "rdump / "+out, image); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		"usr/lib/there": "new", "usr/lib/systemd/system/a.service": "[Unit]", "usr/bin/program": string(program), "etc/unit": "",
	} {
		if got, err := os.ReadFile(filepath.Join(out, path)); err != nil || string(got) != want {
			t.Errorf("%s: %d bytes, %v", path, len(got), err)
		}
	}
	if info, err := os.Stat(filepath.Join(out, "usr/bin/program")); err != nil || info.Mode() != 0o755 {
		t.Errorf("mode: %v, %v", info, err)
	}
	if target, err := os.Readlink(filepath.Join(out, "etc/wants/a.service")); err != nil || target != "../a.service" {
		t.Errorf("link: %q, %v", target, err)
	}
}
