package initrd

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

func TestPatienceEndsWhereWaitingCannotHelp(t *testing.T) {
	for name, tt := range map[string]struct {
		class failure.Class
		heals time.Duration // 0: never
		want  time.Duration // when it ended
		ok    bool
	}{
		"a refusal":                  {failure.EvidenceRefused, 0, 0, false},
		"a policy":                   {failure.PolicyDenied, 0, 0, false},
		"a header":                   {failure.HeaderRefused, 0, 0, false},
		"another server":             {failure.ServerUntrusted, 0, 0, false},
		"a service that comes back":  {failure.Unreachable, 7 * time.Hour, 7 * time.Hour, true},
		"a node that ends":           {failure.Held, time.Hour, time.Hour, true},
		"a late disk":                {failure.NotFound, 90 * time.Second, 90 * time.Second, true},
		"a late TPM":                 {failure.NoDevice, time.Minute, time.Minute, true},
		"a disk that never comes":    {failure.NotFound, 0, 5 * time.Minute, false},
		"a TPM that is not there":    {failure.NoDevice, 0, 5 * time.Minute, false},
		"what has no class, forever": {failure.Internal, 0, 5 * time.Minute, false},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				started := time.Now()
				var out bytes.Buffer
				p := Default
				p.Out = &out
				err := p.Run(t.Context(), func(context.Context) error {
					if tt.heals > 0 && time.Since(started) >= tt.heals {
						return nil
					}
					return failure.WithID(failure.New(tt.class, errors.New("why"), ""), "c0ffee")
				})
				if (err == nil) != tt.ok || time.Since(started) != tt.want {
					t.Errorf("%v after %v", err, time.Since(started))
				}
				if tt.want > 0 && !strings.Contains(out.String(), string(tt.class)+": why (correlation id c0ffee)") {
					t.Errorf("the console said %q", out.String())
				}
			})
		})
	}
}

func TestPatienceEndsWithItsContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 25*time.Second)
		defer cancel()
		p := Default
		p.Out = &bytes.Buffer{}
		n := 0
		err := p.Run(ctx, func(context.Context) error { n++; return failure.New(failure.Unreachable, errors.New("down"), "") })
		if n != 3 || failure.Of(err).Class != failure.Unreachable {
			t.Errorf("%d attempts, %v", n, err)
		}
	})
}

const someConfig = `servers:
  - {address: "keys.example:8443", ca: ca.pem}
volumes:
  - {id: node-1-root, name: root, device: /dev/vda2, format: true}
`

func write(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestInstallTakesWhatTheConfigurationNames(t *testing.T) {
	dir, root := t.TempDir(), t.TempDir()
	pins := strings.Replace(someConfig, "ca: ca.pem", "pins: [sha256:"+strings.Repeat("ab", 32)+"]", 1)
	path := write(t, filepath.Join(dir, "initrd.yaml"), pins+"tpm: {ek_intermediates: ["+dir+"/ek.pem]}\n")
	write(t, filepath.Join(dir, "ek.pem"), "certificates")
	if err := Install(path, root, true); err != nil {
		t.Fatal(err)
	}
	for _, f := range []string{path, dir + "/ek.pem"} {
		if _, err := os.Stat(filepath.Join(root, f)); err != nil {
			t.Error(err)
		}
	}
	text, err := os.ReadFile(filepath.Join(root, `etc/systemd/system/dev-mapper-root.device.d/keyagent.conf`))
	if err != nil || !strings.Contains(string(text), "JobRunningTimeoutSec=infinity") {
		t.Errorf("%q, %v", text, err)
	}
}

func TestInstallRefusesWhatAnInitrdCannotUse(t *testing.T) {
	for name, tt := range map[string]struct{ config, want string }{
		"a certificate that is not there": {someConfig, "ca.pem"},
		"no volume":                       {"servers: [{address: \"a:1\", pins: [sha256:" + strings.Repeat("ab", 32) + "]}]\n", "volumes"},
		"a field that there is not":       {someConfig + "volume: 1\n", "volume"},
	} {
		t.Run(name, func(t *testing.T) {
			root := t.TempDir()
			err := Install(write(t, filepath.Join(t.TempDir(), "initrd.yaml"), tt.config), root, false)
			if failure.Of(err).Class != failure.Configuration || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v", err)
			}
			if left, _ := os.ReadDir(root); len(left) != 0 {
				t.Errorf("it left %v", left)
			}
		})
	}
}

// A link in the tree of an image that leads out of it is not followed.
func TestInstallStaysInsideTheImage(t *testing.T) {
	dir, root, outside := t.TempDir(), t.TempDir(), t.TempDir()
	pins := strings.Replace(someConfig, "ca: ca.pem", "pins: [sha256:"+strings.Repeat("ab", 32)+"]", 1)
	path := write(t, filepath.Join(dir, "initrd.yaml"), pins)
	if err := os.MkdirAll(filepath.Join(root, filepath.Dir(dir)), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(outside, filepath.Join(root, dir)); err != nil {
		t.Fatal(err)
	}
	if err := Install(path, root, false); err == nil {
		t.Error("it was installed through a link")
	}
	if left, _ := os.ReadDir(outside); len(left) != 0 {
		t.Errorf("outside is %v", left)
	}
}

func TestNameServersOfTheNetworkAreUsed(t *testing.T) {
	dir := t.TempDir()
	r := &Resolver{File: filepath.Join(dir, "resolv.conf"), IPConfig: filepath.Join(dir, "net-*.conf"), Networkd: filepath.Join(dir, "state")}
	want := func(text string) {
		t.Helper()
		if err := r.Write(); err != nil {
			t.Fatal(err)
		}
		have, _ := os.ReadFile(r.File)
		if got := strings.TrimPrefix(string(have), "# Written by keyagent for the initrd.\n"); got != text {
			t.Errorf("%q", got)
		}
	}
	want("")
	// As klibc's ipconfig of Debian 12 writes it.
	write(t, filepath.Join(dir, "net-eth0.conf"), "DEVICE='eth0'\nPROTO='dhcp'\nIPV4ADDR='10.0.2.15'\nIPV4DNS0='10.0.2.3'\nIPV4DNS1='0.0.0.0'\n")
	want("nameserver 10.0.2.3\n")
	write(t, filepath.Join(dir, "state"), "# This is private data. Do not parse.\nOPER_STATE=routable\nDNS=10.0.2.3 fd00::3 fe80::1%2 nonsense\n")
	want("nameserver 10.0.2.3\nnameserver fd00::3\n")
	other := &Resolver{File: r.File, IPConfig: r.IPConfig, Networkd: r.Networkd}
	write(t, r.File, "nameserver 192.0.2.1\n")
	r = other
	if err := r.Write(); err != nil {
		t.Fatal(err)
	}
	if have, _ := os.ReadFile(r.File); string(have) != "nameserver 192.0.2.1\n" {
		t.Errorf("somebody's file became %q", have)
	}
}

func FuzzNameservers(f *testing.F) {
	f.Add("DNS=10.0.2.3\nIPV4DNS0='0.0.0.0'")
	f.Fuzz(func(t *testing.T, text string) {
		for _, s := range nameservers(text) {
			if strings.ContainsAny(s, " \n'%") {
				t.Fatalf("%q becomes %q", text, s)
			}
		}
	})
}
