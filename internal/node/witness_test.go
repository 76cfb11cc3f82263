package node

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/witness"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func TestTheWitnessIsWhereTheConfigurationSays(t *testing.T) {
	for _, good := range []string{"tpm", "memory", "/var/lib/keyagent/witness"} {
		if _, err := loadWith(t, "", "witness: "+good+"\n"); err != nil {
			t.Errorf("%s: %v", good, err)
		}
	}
	for _, bad := range []string{"off", "witness", "./witness", "/a/../b", "TPM"} {
		if _, err := loadWith(t, "", "witness: "+bad+"\n"); err == nil || !strings.Contains(err.Error(), "witness") {
			t.Errorf("%s: %v", bad, err)
		}
	}
}

// The TPM where there is one that can be used, else the file.
func TestAMemoryStandsInForAnother(t *testing.T) {
	data := bytes.Repeat([]byte{1}, witness.Size)
	file := filepath.Join(t.TempDir(), "made", "witness")
	nv := &tpm.NV{Device: swtpm.New(t, nil).Device, Index: witnessIndex, Size: witness.Size}
	for name, tt := range map[string]struct {
		first  witness.Memory
		inFile bool
		err    error
	}{
		"a TPM":           {nv, false, nil},
		"no TPM":          {&tpm.NV{Device: "/nonexistent", Index: witnessIndex, Size: witness.Size}, true, nil},
		"a TPM with room": {&tpm.NV{Device: nv.Device, Index: witnessIndex + 1, Size: witness.Size}, false, nil},
		"a full TPM":      {full{}, true, tpm.ErrNV},
	} {
		if err := os.RemoveAll(filepath.Dir(file)); err != nil {
			t.Fatal(err)
		}
		e := &either{first: tt.first, second: witnessFile(file)}
		if got, err := e.Load(); err != nil || got != nil {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
		if err := e.Store(data); !errors.Is(err, tt.err) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Stat(file); (err == nil) != tt.inFile {
			t.Errorf("%s: %v", name, err)
		}
		again := &either{first: tt.first, second: witnessFile(file)}
		if got, err := again.Load(); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: %d bytes came back, %v", name, len(got), err)
		}
	}
}

// full is a TPM without room.
type full struct{}

func (full) Load() ([]byte, error) { return nil, nil }
func (full) Store([]byte) error    { return tpm.ErrNV }
