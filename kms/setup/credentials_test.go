//go:build !keyagent_noaws && !keyagent_noazure && !keyagent_nogcp && !keyagent_noetcd

package setup

import (
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/test/sim/cloud"
)

// Each secret can be a systemd credential as well as a file.
func TestSecretsComeFromSystemd(t *testing.T) {
	for name, start := range map[string]func(testing.TB) cloud.Shape{"AWS": cloud.AWS, "Azure": cloud.Azure} {
		t.Run(name, func(t *testing.T) {
			shape := start(t)
			credentials := t.TempDir()
			t.Setenv("CREDENTIALS_DIRECTORY", credentials)
			u, err := url.Parse(shape.KMS)
			if err != nil {
				t.Fatal(err)
			}
			params, moved := u.Query(), 0
			for key := range params {
				plain, isFile := strings.CutSuffix(key, "File")
				if !isFile || plain == "ca" {
					continue
				}
				text, err := os.ReadFile(params.Get(key))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(credentials, plain), text, 0o600); err != nil {
					t.Fatal(err)
				}
				params.Del(key)
				params.Set(plain+"Credential", plain)
				moved++
			}
			if moved == 0 {
				t.Fatalf("no secret is in %s", Redact(shape.KMS))
			}
			u.RawQuery = params.Encode()
			k, err := KMS(t.Context(), u.String())
			if err != nil {
				t.Fatal(err)
			}
			defer k.Close()
			key, _, err := k.Generate(t.Context(), kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32})
			if err != nil {
				t.Fatal(err)
			}
			key.Close()
		})
	}
}
