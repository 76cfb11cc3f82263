package filesystem

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
)

// A volume has sectors of 4096 bytes, and an image may have been made for smaller ones.
func TestAFilesystemSuitsSectorsThatAreNotLarger(t *testing.T) {
	for _, tt := range []struct {
		fstype string
		args   []string
		suits  bool
	}{
		{"ext4", []string{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096"}, true},
		{"ext4", []string{"mke2fs", "-q", "-F", "-t", "ext4", "-b", "1024"}, false},
		{"xfs", []string{"mkfs.xfs", "-q", "-s", "size=4096"}, true},
		{"xfs", []string{"mkfs.xfs", "-q", "-s", "size=512"}, false},
	} {
		path := filepath.Join(t.TempDir(), "image")
		f, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := f.Truncate(320 << 20); err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command(tt.args[0], append(tt.args[1:], path)...).CombinedOutput(); err != nil {
			t.Fatalf("%v: %v: %s", tt.args, err, out)
		}
		err = suits(f, tt.fstype, 4096)
		if (err == nil) != tt.suits || err != nil && failure.Of(err).Class != failure.Configuration {
			t.Errorf("%v: %v", tt.args, err)
		}
		if err := suits(f, tt.fstype, 512); err != nil {
			t.Errorf("%v, sectors of 512: %v", tt.args, err)
		}
		if err := suits(f, "none", 4096); err != nil {
			t.Errorf("of another type: %v", err)
		}
	}
}
