//go:build umlguest

package crash

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/demo"
	"github.com/keyagent/keyagent/test/sim/swtpm"
	"github.com/keyagent/keyagent/test/suite/e2e/inject"
)

// What package e2e hands in by the environment.
var (
	program = os.Getenv("KEYAGENT_TEST_PROGRAM")
	maker   = os.Getenv("KEYAGENT_TEST_TPM")    // a TPM's state, and its maker's certificate
	budget  = os.Getenv("KEYAGENT_TEST_BUDGET") // of the longer walk; the other gets a quarter
)

// deviceSize leaves 4 MiB for data.
const deviceSize = 20 << 20

// machine is a guest with a TPM, a key service, and any number of volumes.
type machine struct {
	dir     string
	service *demo.Service
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{dir: t.TempDir()}
	command(t, "ip", "link", "set", "lo", "up")
	command(t, "cp", "-r", filepath.Join(maker, "state"), m.path("tpm"))
	m.startTPM(t)
	var err error
	m.service, err = demo.NewService(m.path("service"), program)
	must(t, err)
	command(t, "cp", filepath.Join(maker, "issuercert.pem"), m.path("service/tpm-maker.pem"))
	must(t, os.WriteFile(m.path("service/policy.yaml"), []byte(policyText), 0o644))
	must(t, m.service.Start(context.WithoutCancel(t.Context())))
	t.Cleanup(func() { must(t, m.service.Stop()) })
	return m
}

// The register after one extension by zeros, which is what the test measures.
const policyText = `version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: tpm-maker.pem}]
profiles:
  - name: guest
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
grants:
  - {name: any, profiles: [guest], volumes: ["v*"], operations: [open, format]}
`

func (m *machine) path(name string) string { return filepath.Join(m.dir, name) }

func (m *machine) socket() string { return m.path("tpm.sock") }

// startTPM starts the TPM and measures something into it.
func (m *machine) startTPM(t *testing.T) {
	t.Helper()
	stop, err := swtpm.Start(m.path("tpm"), m.socket())
	must(t, err)
	t.Cleanup(stop)
	dev, err := tpm.OpenDevice("unix:" + m.socket())
	must(t, err)
	defer dev.Close()
	_, err = tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(4), Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}.Execute(dev)
	must(t, err)
}

// volume is one volume of the machine, with a configuration of its own.
type volume struct {
	m      *machine
	id     string
	image  string
	device string
	config string
}

func (m *machine) newVolume(t *testing.T, id string) *volume {
	t.Helper()
	v := &volume{m: m, id: id, image: m.path(id + ".img"), config: m.path(id + ".yaml")}
	must(t, os.WriteFile(v.image, nil, 0o600))
	must(t, os.Truncate(v.image, deviceSize))
	v.device = command(t, "losetup", "-f", "--show", v.image)
	must(t, os.WriteFile(v.config, fmt.Appendf(nil, `servers: [{address: "%s", name: keyservice.demo, ca: service/ca.pem}]
tpm: {device: "unix:%s", event_log: /nonexistent}
state_dir: %s
retry: {budget: 30s}
callers: []
volumes: [{id: %s, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s}]
`, m.service.Address, m.socket(), m.path("state"), id, v.device, v.mount()), 0o600))
	return v
}

func (v *volume) mount() string { return v.m.path("mnt-" + v.id) }

func (v *volume) remove(t *testing.T) {
	t.Helper()
	command(t, "umount", v.mount())
	command(t, "dmsetup", "remove", v.id)
	_ = os.Remove("/dev/mapper/" + v.id) // there is no udev that would
	command(t, "losetup", "-d", v.device)
	must(t, os.Remove(v.image))
}

func (v *volume) keyagent(args ...string) *exec.Cmd {
	return exec.Command(program, append(args, "--standalone", "--config", v.config, "--log-format", "json")...)
}

func (v *volume) mustRun(t *testing.T, args ...string) {
	t.Helper()
	if out, err := v.keyagent(args...).CombinedOutput(); err != nil {
		t.Fatalf("keyagent %s: %v: %s", strings.Join(args, " "), err, out)
	}
}

// unlockKilledAt runs keyagent unlock until its n-th call that writes.
func (v *volume) unlockKilledAt(t *testing.T, n int) inject.Result {
	t.Helper()
	cmd := v.keyagent("unlock")
	reader, writer, err := os.Pipe()
	must(t, err)
	cmd.Stdout, cmd.Stderr = writer, writer
	p, err := inject.Start(cmd, n)
	must(t, errClose(err, writer))
	text := make(chan string)
	go func() { text <- readAll(reader) }()
	res, err := p.Wait()
	said := <-text
	must(t, err)
	if !res.Killed && res.ExitCode != 0 {
		t.Fatalf("keyagent unlock ended with %d: %s", res.ExitCode, said)
	}
	return res
}

// record is what the key service keeps of the volume, as far as it must stay.
type record struct {
	UUID       string `json:"luks_uuid"`
	Generation uint64 `json:"generation"`
	KeyVersion uint32 `json:"key_version"`
	State      string `json:"state"`
}

// record reads the service's file; absent is a record that is not there yet.
func (v *volume) record(t *testing.T) (r record, found bool) {
	t.Helper()
	data, err := os.ReadFile(v.m.path("service/records/volumes/" + v.id + ".obj"))
	if os.IsNotExist(err) {
		return r, false
	}
	must(t, err)
	// A line of the storage and one of the record, then JSON.
	text := data[bytes.LastIndexByte(data, '\n')+1:]
	must(t, json.Unmarshal(text, &r))
	if r.UUID == "" {
		t.Fatalf("record of %s: %s", v.id, text)
	}
	return r, true
}

// Case 38, Show 6: the agent is killed at each call that writes while it makes a
// volume. It runs again, and the volume is there, under the key that it had.
func TestAnAgentKilledWhileItMakesAVolumeConverges(t *testing.T) {
	m := newMachine(t)
	first := m.newVolume(t, "v0")
	calls := first.unlockKilledAt(t, 0).Calls
	first.remove(t)
	t.Logf("CRASH a first provision makes %d calls that write:\n%s", len(calls), strings.Join(calls, "\n"))
	pending, active := 0, 0
	walk(t, "making a volume", 1, len(calls), func(n int) {
		v := m.newVolume(t, fmt.Sprintf("v%d", n))
		res := v.unlockKilledAt(t, n)
		at := res.Calls[len(res.Calls)-1]
		before, found := v.record(t)
		if found && before.State == "pending" {
			pending++
		} else {
			active++
		}
		v.mustRun(t, "unlock")
		after, _ := v.record(t)
		if after.State != "active" || found && (before.UUID != after.UUID || before.Generation != after.Generation || before.KeyVersion != after.KeyVersion) {
			t.Errorf("killed at call %d, %s: record %+v, then %+v", n, at, before, after)
		}
		v.keepsData(t, fmt.Sprintf("call %d, %s", n, at))
		v.remove(t)
	})
	t.Logf("CRASH after the kill the record was %d times pending, %d times active", pending, active)
}

// keepsData writes into the mounted volume, closes and opens it, and reads.
func (v *volume) keepsData(t *testing.T, killedAt string) {
	t.Helper()
	file := filepath.Join(v.mount(), "data")
	must(t, os.WriteFile(file, []byte(killedAt), 0o600))
	v.mustRun(t, "close", v.id)
	v.mustRun(t, "unlock")
	if got, err := os.ReadFile(file); err != nil || string(got) != killedAt {
		t.Fatalf("killed at %s: %v, the file holds %q", killedAt, err, got)
	}
}

// The same for a volume that is in use: nothing of what it holds is lost.
func TestAnAgentKilledWhileItOpensAVolumeLosesNothing(t *testing.T) {
	m := newMachine(t)
	v := m.newVolume(t, "v0")
	v.mustRun(t, "unlock")
	file := filepath.Join(v.mount(), "data")
	must(t, os.WriteFile(file, []byte("precious"), 0o600))
	v.mustRun(t, "close", v.id)
	want, _ := v.record(t)
	calls := v.unlockKilledAt(t, 0).Calls
	v.mustRun(t, "close", v.id)
	t.Logf("CRASH opening makes %d calls that write:\n%s", len(calls), strings.Join(calls, "\n"))
	walk(t, "opening a volume", 4, len(calls), func(n int) {
		res := v.unlockKilledAt(t, n)
		v.mustRun(t, "unlock")
		if got, err := os.ReadFile(file); err != nil || string(got) != "precious" {
			t.Fatalf("killed at call %d, %s: %v, the file holds %q", n, res.Calls[len(res.Calls)-1], err, got)
		}
		if got, _ := v.record(t); got != want {
			t.Errorf("the record is %+v, was %+v", got, want)
		}
		v.mustRun(t, "close", v.id)
	})
	v.mustRun(t, "unlock")
	v.remove(t)
}

// walk visits the points 1 to n, spread evenly however far it comes within the
// budget's share, and says how far that was.
func walk(t *testing.T, what string, share time.Duration, n int, visit func(point int)) {
	t.Helper()
	limit, err := time.ParseDuration(budget)
	must(t, err)
	limit /= share
	began, visited := time.Now(), 0
	for _, point := range spread(n) {
		// A slow machine visits few points, and never fewer than these.
		if visited >= min(n, 6) && time.Since(began) > limit {
			break
		}
		visit(point)
		visited++
	}
	t.Logf("CRASH %s: killed at %d of %d calls in %.0f s", what, visited, n, time.Since(began).Seconds())
}

// spread is an order of 1 to n whose every beginning is spread over the whole.
func spread(n int) []int {
	var order []int
	seen := map[int]bool{}
	for step := n; ; step = (step + 1) / 2 {
		for point := n; point >= 1; point -= step {
			if !seen[point] {
				seen[point] = true
				order = append(order, point)
			}
		}
		if step <= 1 {
			return order
		}
	}
}
