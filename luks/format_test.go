package luks

import (
	"context"
	"github.com/keyagent/keyagent/internal/secret"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestSmoke(t *testing.T) {
	img := filepath.Join(t.TempDir(), "disk.img")
	f, _ := os.Create(img)
	f.Truncate(48 << 20)
	f.Close()
	dek, err := secret.Random(32)
	if err != nil {
		t.Fatal(err)
	}
	id := Identity{"data", "6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11", 1}
	mac, err := Format(context.Background(), img, id, dek, FormatOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%x", mac)
	got, err := Adopt(context.Background(), img, id, dek)
	if err != nil || got != mac {
		t.Fatal(err, got)
	}
	out, err := exec.Command("cryptsetup", "luksDump", img).CombinedOutput()
	t.Logf("%s %v", out, err)
}
