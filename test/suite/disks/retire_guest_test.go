//go:build umlguest

package disks

import (
	"bytes"
	"path/filepath"
	"testing"
)

// A volume ends, and nothing brings it back: not its disk, not a copy of its header, not its
// node. Only an operator begins it anew, with another key.
func TestDiskARetiredVolumeIsGone(t *testing.T) {
	n := first(t)
	_, nodes := lab()
	device, at := n.one(t, "v-retired")
	admin := filepath.Join(n.world.dir, "admin.sock")
	blank := func() bool { return bytes.Equal(peek(t, device, 0, 16*mib), make([]byte, 16*mib)) }
	retire := func(more ...string) []string {
		return append([]string{"retire", "v-retired", "--destroy-the-key"}, more...)
	}
	a := n.start(t)
	a.waitFor(t, "msg=ready")
	n.must(t, "backup-header", "v-retired", "retired-header")
	old := peek(t, device, 0, 290816)
	n.fails(t, 2, "needs a word", "retire", "v-retired")
	n.fails(t, 15, "close it first", retire()...)
	nodes[1].configure(t, "{id: v-retired, name: not-retired, device: "+share(t, 3000, [2]int{0, 0}).devices[0]+"}")
	nodes[1].fails(t, 16, "held", retire()...)
	n.must(t, "close", "v-retired")
	if bytes.Equal(peek(t, device, 0, 290816), make([]byte, 290816)) {
		t.Fatal("a refusal erased the header")
	}
	n.must(t, retire()...)
	if _, state := n.keyVersion(t, "v-retired"); state != "retired" || !blank() {
		t.Errorf("the volume is %s, its header erased: %v", state, blank())
	}
	n.fails(t, 15, "wrong state", "unlock", "v-retired")
	n.fails(t, 15, "wrong state", "restore-header", "v-retired", "retired-header")
	// The host kept the header. The agent was cut off before it erased it, or this is it again.
	overwrite(t, device, 0, old)
	n.fails(t, 15, "wrong state", "unlock", "v-retired")
	a.kill()
	n.must(t, retire("--standalone")...)
	if !blank() {
		t.Error("the second time the header was not erased")
	}
	tool(t, program(), "volume", "retire", "v-retired", "--destroy-the-key", "--admin", admin)
	tool(t, program(), "volume", "reset", "v-retired", "--the-disk-is-lost", "--admin", admin)
	n.fails(t, 12, "not blank", "unlock", "v-retired", "--standalone") // what is left means nothing, and is somebody's all the same
	tool(t, "blkdiscard", "-z", device)
	n.must(t, "unlock", "v-retired", "--standalone")
	if v, state := n.keyVersion(t, "v-retired"); v != 2 || state != "active" {
		t.Errorf("begun anew the volume is %s with key version %d", state, v)
	}
	put(t, filepath.Join(at, "note"), "anew")
	n.must(t, "close", "v-retired", "--standalone")
}
