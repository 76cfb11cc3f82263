package measured

import (
	"bytes"
	"context"
	"crypto/sha512"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

const (
	testName = "data"
	testUUID = "00112233-4455-4677-8899-aabbccddeeff"
)

// event is that of the DEK of bytes 0 to 31.
func event(t *testing.T, name string) Event {
	t.Helper()
	raw := make([]byte, 32)
	for i := range raw {
		raw[i] = byte(i)
	}
	dek, err := secret.From(raw)
	if err != nil {
		t.Fatal(err)
	}
	defer dek.Close()
	e, err := Of(dek, name, testUUID)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// The vector was computed by another program, from the text alone.
func TestTheVectorOfTheMeasuredVolumeSpecificationHolds(t *testing.T) {
	text, err := os.ReadFile("../../docs/spec/measured-volume.md")
	if err != nil {
		t.Fatal(err)
	}
	e := event(t, testName)
	for what, got := range map[string][]byte{"SHA-256": e.SHA256[:], "SHA-384": e.SHA384[:], "pcr15": tpm.Extend(make([]byte, 32), e.SHA256[:])} {
		m := regexp.MustCompile("(?m)^\\| " + what + " \\| `([0-9a-f]+)` \\|$").FindSubmatch(text)
		if m == nil || string(m[1]) != hex.EncodeToString(got) {
			t.Errorf("%s is %x, the specification says %s", what, got, m)
		}
	}
	if e.Text != "cryptsetup:data:"+testUUID || !strings.Contains(string(text), "`"+e.Text+"`") {
		t.Errorf("the text is %q", e.Text)
	}
	if other := event(t, "other"); other.SHA256 == e.SHA256 || other.SHA384 == e.SHA384 {
		t.Error("another mapping has the same digest")
	}
}

func pcr15(t *testing.T, device string) []byte {
	t.Helper()
	dev, err := tpm.OpenDevice(device)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	rsp, err := tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(PCR)},
	}}}.Execute(dev)
	if err != nil {
		t.Fatal(err)
	}
	return rsp.PCRValues.Digests[0].Buffer
}

// What several volumes write at once is in the register and in systemd's log, in one
// order, and the log leads to the register's value.
func TestTheLogLeadsToTheRegister(t *testing.T) {
	p := swtpm.New(t, nil)
	r := &TPM{Device: p.Device, Log: filepath.Join(t.TempDir(), "log/systemd/tpm2-measure.log"), Warn: func(err error) { t.Error(err) }}
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := pcr15(t, p.Device); !bytes.Equal(got, make([]byte, 32)) {
		t.Fatalf("pcr 15 is %x before anything is measured", got)
	}
	names := []string{"a", "b", "c", "d"}
	var wg sync.WaitGroup
	for _, name := range names {
		wg.Go(func() {
			e := event(t, name)
			if got, err := r.Extend(t.Context(), e); err != nil || got.Register != "pcr15" || !bytes.Equal(got.Digest, e.SHA256[:]) {
				t.Errorf("%s: %v, %v", name, got, err)
			}
		})
	}
	wg.Wait()
	log, err := os.ReadFile(r.Log)
	if err != nil {
		t.Fatal(err)
	}
	var parsed tpm.EventLog
	if err := parsed.AddUserspace(log); err != nil {
		t.Fatal(err)
	}
	events, err := parsed.Explain(PCR, pcr15(t, p.Device))
	if err != nil || len(events) != len(names) {
		t.Fatalf("%d events lead to the value: %v\n%s", len(events), err, log)
	}
	for _, name := range names {
		if e := event(t, name); !strings.Contains(string(log), e.Text) {
			t.Errorf("the log lacks %s", e.Text)
		}
	}
	if st, err := os.Stat(r.Log); err != nil || st.Mode() != 0o600 {
		t.Errorf("the log is left as %v, %v", st.Mode(), err)
	}
}

// A log that somebody holds is waited for. One that was left half-written is not gone on
// with: the register is extended, and the person hears why nothing will explain it.
func TestALogThatCannotBeWritten(t *testing.T) {
	p := swtpm.New(t, nil)
	var said error
	r := &TPM{Device: p.Device, Log: filepath.Join(t.TempDir(), "tpm2-measure.log"), Warn: func(err error) { said = err }}
	f, err := os.OpenFile(r.Log, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if _, err := r.Extend(ctx, event(t, testName)); !errors.Is(err, context.DeadlineExceeded) || unextended(t, p.Device) == false {
		t.Errorf("while somebody else writes: %v", err)
	}
	if err := errors.Join(f.Chmod(0o600|os.ModeSticky), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Extend(t.Context(), event(t, testName)); err != nil || !errors.Is(said, errTorn) || unextended(t, p.Device) {
		t.Errorf("behind half a record: %v, said %v", err, said)
	}
	if log, err := os.ReadFile(r.Log); err != nil || len(log) > 0 {
		t.Errorf("it was written to: %q, %v", log, err)
	}
}

func unextended(t *testing.T, device string) bool {
	return bytes.Equal(pcr15(t, device), make([]byte, 32))
}

// The kernel's file takes one digest and shows the register's value.
func TestATDsRegisterGetsTheLongDigest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "rtmr3:sha384")
	if err := os.WriteFile(path, make([]byte, sha512.Size384), 0o600); err != nil {
		t.Fatal(err)
	}
	r := &RTMR{Path: path}
	if err := r.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	e := event(t, testName)
	got, err := r.Extend(t.Context(), e)
	if err != nil || got.Register != "rtmr3" {
		t.Fatal(got, err)
	}
	if written, err := os.ReadFile(path); err != nil || !bytes.Equal(written, e.SHA384[:]) {
		t.Errorf("written: %x, %v", written, err)
	}
}

// A register that is there and cannot be used is not one that may still come.
func TestARegisterThatIsBrokenIsNotAwaited(t *testing.T) {
	broken := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(broken, make([]byte, 20), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]Register{"a TPM": &TPM{Device: broken}, "a file that is not the kernel's": &RTMR{Path: broken}} {
		err := r.Ready(t.Context())
		if f := failure.Of(err); errors.Is(err, ErrNoRegister) || f.Class != failure.DeviceBusy || f.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAMachineWithoutARegisterSaysSo(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for name, r := range map[string]Register{"no register": None{}, "no TPM": &TPM{Device: none}, "no TD": &RTMR{Path: none}} {
		err := r.Ready(t.Context())
		if f := failure.Of(err); !errors.Is(err, ErrNoRegister) || f.Class != failure.NoDevice || f.Hint == "" {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := r.Extend(t.Context(), Event{}); !errors.Is(err, ErrNoRegister) {
			t.Errorf("%s: extended, %v", name, err)
		}
	}
}
