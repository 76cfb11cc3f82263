//go:build umlguest

package disks

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What the initrd left open and the configuration does not list is proved anew like the
// rest, and from then on is this system's own.
func TestDiskWhatTheInitrdLeftIsProvedAlsoIfItIsNotListed(t *testing.T) {
	m := first(t)
	removed(t, "v-handed")
	m.configure(t, "{id: v-handed, device: "+disk(t, diskSize)+", format: true}")
	m.must(t, "unlock", "v-handed")
	state := filepath.Join(m.dir, "state", "v-handed.json")
	text := must[[]byte](t)(os.ReadFile(state))
	// As an initrd writes it.
	handed := strings.Replace(string(text), `{"spec"`, `{"initrd":true,"spec"`, 1)
	check(t, os.WriteFile(state, []byte(handed), 0o600))

	m.configure(t)
	a := m.start(t)
	a.waitFor(t, `took over a mapping from the initrd; it has the volume's key" volume=v-handed`)
	a.waitFor(t, `msg="volume is open" volume=v-handed`)
	a.kill()
	now := string(must[[]byte](t)(os.ReadFile(state)))
	if strings.Contains(now, `"initrd":true`) || !strings.Contains(now, `"from_initrd":true`) {
		t.Errorf("it is still the initrd's, or never was: %s", now)
	}
	if !mapped("v-handed") {
		t.Error("the mapping is gone")
	}
	m.must(t, "close", "v-handed")
}
