package azure

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"github.com/keyagent/keyagent/attestation"
)

// FuzzHCL: what is read has a key and a digest of exactly its runtime data.
func FuzzHCL(f *testing.F) {
	var genuine []*Report
	for _, path := range []string{"testdata/hcl-report-snp.bin", "testdata/hcl-report-tdx.bin"} {
		data := must[[]byte](f)(os.ReadFile(path))
		genuine = append(genuine, must[*Report](f)(Parse(data)))
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := Parse(data)
		if err != nil {
			if !errors.Is(err, attestation.ErrRefused) {
				t.Fatalf("a nameless error: %v", err)
			}
			return
		}
		if r.AK.N.BitLen() != 2048 || r.config.ID == "" || r.Claims().Facts["vm_id"] != r.config.ID {
			t.Fatalf("%+v", r)
		}
		for _, g := range genuine {
			// A report that the same hardware report covers says the same.
			if r.Isolation == g.Isolation && bytes.Equal(r.Hardware, g.Hardware) && r.coversRuntime() &&
				(!r.AK.Equal(g.AK) || r.config.ID != g.config.ID || *r.config.SecureBoot != *g.config.SecureBoot) {
				t.Fatalf("%+v", r)
			}
		}
	})
}
