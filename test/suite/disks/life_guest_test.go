//go:build umlguest

package disks

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestDiskLifeOfAVolume(t *testing.T) {
	n := first(t)
	for _, fs := range []string{"ext4", "xfs", "btrfs"} {
		t.Run(fs, func(t *testing.T) {
			size := int64(diskSize)
			if fs != "ext4" {
				size = 400 * mib // the least that mkfs.xfs takes, and some
			}
			device, at, id := disk(t, size), mountPoint(t, "a/b/"+fs), "v-life-"+fs
			removed(t, id)
			n.configure(t, fmt.Sprintf("{id: %s, device: %s, format: true, filesystem: %s, no_mmp: true, label: keys, mount: %s}", id, device, fs, at))
			out := n.must(t, "unlock")
			if !strings.Contains(out, "open and mounted on "+at) {
				t.Errorf("unlock says %q", out)
			}
			put(t, filepath.Join(at, "note"), "kept")
			n.must(t, "unlock") // it is open already
			out = n.must(t, "status")
			if !strings.Contains(out, "mounted") || !strings.Contains(out, "held") {
				t.Errorf("status says\n%s", out)
			}
			n.must(t, "close", id)
			if mapped(id) || mounted(at) {
				t.Error("it is not closed")
			}
			n.must(t, "close", id)
			n.must(t, "unlock")
			holds(t, filepath.Join(at, "note"), "kept")
			// The parents of the mount point are for everybody (B9).
			for _, dir := range []string{filepath.Dir(at), filepath.Dir(filepath.Dir(at))} {
				if st, err := os.Stat(dir); err != nil || st.Mode().Perm() != 0o755 {
					t.Errorf("%s has mode %v, %v", dir, st.Mode(), err)
				}
			}
			n.must(t, "close", "--all")
		})
	}
}

// A volume that another process of this node opened, and ended since, is the running
// agent's: nobody else would renew its lease.
func TestDiskAVolumeThatAnotherProcessOpenedKeepsItsLease(t *testing.T) {
	n := first(t)
	device := disk(t, diskSize)
	removed(t, "v-alone")
	n.configure(t, fmt.Sprintf("{id: v-alone, device: %s, format: true, filesystem: ext4, no_mmp: true, on_request: true}", device))
	n.fails(t, 4, "agent", "unlock", "--need-agent", "v-alone")
	running := n.start(t)
	running.waitFor(t, "msg=ready")
	if mapped("v-alone") {
		t.Error("it was opened, and nobody had asked for it")
	}
	n.must(t, "unlock", "--standalone", "v-alone")
	n.must(t, "unlock", "--need-agent", "v-alone")
	if out := n.must(t, "status"); !strings.Contains(out, "held") {
		t.Errorf("status says\n%s", out)
	}
	n.must(t, "close", "v-alone")
	running.kill()
}
