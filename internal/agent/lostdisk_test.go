package agent

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/luks"
)

// anyDisk is a block device of this machine, with its sequence number.
func anyDisk(t *testing.T) luks.DevNum {
	t.Helper()
	all, err := filepath.Glob("/sys/dev/block/*/diskseq")
	if err != nil || len(all) == 0 {
		t.Fatalf("%v: no block device has a sequence number (hint: the tests need Linux 5.15 or newer)", err)
	}
	var n luks.DevNum
	if _, err := fmt.Sscanf(filepath.Base(filepath.Dir(all[0])), "%d:%d", &n.Major, &n.Minor); err != nil {
		t.Fatal(err)
	}
	return n
}

// withoutSequence is a device that is there, and of which the kernel shows no sequence.
func withoutSequence(t *testing.T) luks.DevNum {
	t.Helper()
	all, _ := filepath.Glob("/sys/dev/block/*")
	for _, path := range all {
		var n luks.DevNum
		if _, err := fmt.Sscanf(filepath.Base(path), "%d:%d", &n.Major, &n.Minor); err == nil && diskSequence(n) == 0 {
			return n
		}
	}
	return luks.DevNum{} // this kernel has none
}

func TestALostDiskIsSeen(t *testing.T) {
	there := anyDisk(t)
	seq := diskSequence(there)
	if seq == 0 {
		t.Fatalf("%v has no sequence number", there)
	}
	for name, tt := range map[string]struct {
		r    remembered
		lost bool
	}{
		"it is there":                        {remembered{Device: there, Disk: seq}, false},
		"of an agent that kept no sequence":  {remembered{Device: there}, false},
		"nobody knows":                       {remembered{Device: withoutSequence(t), Disk: 1}, false},
		"another disk has its number":        {remembered{Device: there, Disk: seq + 1}, true},
		"nothing has its number":             {remembered{Device: luks.DevNum{Major: 4095, Minor: 1}}, true},
		"a mapping that was cut has no disk": {remembered{}, false},
	} {
		if got := tt.r.lost(); got != tt.lost {
			t.Errorf("%s: %v", name, got)
		}
	}
	if parts, _ := filepath.Glob("/sys/class/block/*/partition"); len(parts) > 0 {
		var n luks.DevNum
		data, err := os.ReadFile(filepath.Join(filepath.Dir(parts[0]), "dev"))
		if err == nil {
			_, err = fmt.Sscanf(string(data), "%d:%d", &n.Major, &n.Minor)
		}
		if err != nil || diskSequence(n) == 0 {
			t.Errorf("the disk of partition %v has no sequence number: %v", n, err)
		}
	}
}
