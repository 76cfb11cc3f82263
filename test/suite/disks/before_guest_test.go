//go:build umlguest

package disks

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the release before this one left is opened as it is: testdata/release-before
// holds its records, its master secret, its audit log and a disk of 20 MiB. It was
// made by that release, in a guest like this one.
func TestDiskWhatTheReleaseBeforeLeftIsOpenedAsItIs(t *testing.T) {
	_ = first(t) // its makers of TPMs are trusted here as well
	shared, nodes := lab()
	w := newWorld(t)
	tool(t, "tar", "xJf", os.Getenv("KEYAGENT_TEST_DATA")+"/release-before.tar.xz", "-C", w.dir)
	w.maker = shared.maker
	policy := string(must[[]byte](t)(os.ReadFile(filepath.Join(shared.dir, "policy.yaml"))))
	w.write(t, "policy.yaml", policy)
	record := filepath.Join(w.dir, "records/volumes/v-old.obj")
	before := must[[]byte](t)(os.ReadFile(record))
	w.serve(t)
	n := *nodes[0]
	n.world, n.dir = w, w.mkdir(t, "node")
	device, at := loop(t, filepath.Join(w.dir, "disk.img")), mountPoint(t, "data")
	removed(t, "v-old")
	// Its configuration, field for field.
	check(t, os.WriteFile(filepath.Join(n.dir, "agent.yaml"), []byte(fmt.Sprintf(`servers: [{address: "127.0.0.1:%s", ca: %s/ca.pem}]
tpm: {device: "%s", event_log: /nonexistent}
state_dir: %s/state
socket: %s/agent.sock
callers: [{uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}]
retry: {budget: 20s, first: 50ms, max: 500ms}
volumes: [{id: v-old, device: %s, format: true, filesystem: ext4, mount: %s}]
`, w.port, w.dir, n.tpm.Device, n.dir, n.dir, device, at)), 0o600))
	header := peek(t, device, 0, 290816)
	n.must(t, "unlock")
	holds(t, filepath.Join(at, "note"), "kept since the release before")
	put(t, filepath.Join(at, "more"), "of this release")
	n.must(t, "backup-header", "v-old", "saved")
	n.must(t, "close", "v-old")
	n.must(t, "unlock")
	holds(t, filepath.Join(at, "more"), "of this release")
	n.must(t, "close", "v-old")
	if string(peek(t, device, 0, 290816)) != string(header) {
		t.Error("the header was rewritten")
	}
	after := string(must[[]byte](t)(os.ReadFile(record)))
	if !strings.Contains(after, `"state":"active"`) || strings.Contains(after, "copy_macs") || !strings.Contains(string(before), `"state":"active"`) {
		t.Errorf("the record is\n%s", after)
	}
	tool(t, program(), "audit", "verify", filepath.Join(w.dir, "audit.log"))
	// One damaged copy of such a header has no second chance but the backup.
	overwrite(t, device, 5000, []byte{header[5000] ^ 1})
	n.fails(t, 9, "", "unlock")
	n.must(t, "restore-header", "v-old", "saved")
	n.must(t, "unlock")
	holds(t, filepath.Join(at, "note"), "kept since the release before")
	n.must(t, "close", "v-old")
}
