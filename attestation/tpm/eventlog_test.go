package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-eventlog/tcg"
	"github.com/google/go-tpm/tpm2"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/eventlog"
	"github.com/keyagent/keyagent/test/swtpm"
)

// genuineLog is the log of one boot of a unified kernel image under OVMF, with
// the PCRs that the kernel read afterwards.
func genuineLog(t testing.TB) ([]byte, map[uint32][]byte) {
	t.Helper()
	log := must[[]byte](t)(os.ReadFile("testdata/ovmf.eventlog"))
	var text map[string]string
	if err := json.Unmarshal(must[[]byte](t)(os.ReadFile("testdata/ovmf.pcrs.json")), &text); err != nil {
		t.Fatal(err)
	}
	values := map[uint32][]byte{}
	for pcr, value := range text {
		values[uint32(must[int](t)(strconv.Atoi(pcr)))] = must[[]byte](t)(hex.DecodeString(value))
	}
	return log, values
}

// rawEvent is one entry of a log with SHA-256 digests alone.
type rawEvent struct {
	pcr, kind uint32
	digest    []byte
	data      []byte
}

func split(t testing.TB, log []byte) (head []byte, events []rawEvent) {
	t.Helper()
	u32 := binary.LittleEndian.Uint32
	n := 32 + u32(log[28:])
	head, log = log[:n], log[n:]
	for len(log) > 0 {
		if u32(log[8:]) != 1 || binary.LittleEndian.Uint16(log[12:]) != 0x000B {
			t.Fatal("the fixture has other banks")
		}
		size := u32(log[46:])
		events = append(events, rawEvent{u32(log), u32(log[4:]), log[14:46], log[50 : 50+size]})
		log = log[50+size:]
	}
	return head, events
}

func join(head []byte, events []rawEvent) []byte {
	le := binary.LittleEndian
	out := bytes.Clone(head)
	for _, e := range events {
		out = le.AppendUint32(le.AppendUint32(le.AppendUint32(out, e.pcr), e.kind), 1)
		out = append(le.AppendUint16(out, 0x000B), e.digest...)
		out = append(le.AppendUint32(out, uint32(len(e.data))), e.data...)
	}
	return out
}

func TestAGenuineEventLogIsExplained(t *testing.T) {
	log, values := genuineLog(t)
	measurements, err := explain(values, log)
	if err != nil {
		t.Fatal(err)
	}
	for pcr, want := range map[uint32][]string{
		0:  {"firmware version", "firmware"},
		4:  {"EFI application"},
		5:  {"Exit Boot Services Invocation"},
		7:  {"Secure Boot state (SecureBoot)", "Secure Boot PK", "Secure Boot KEK", "Secure Boot db", "Secure Boot dbx", "separator"},
		11: {"kernel (.linux)", "kernel command line (.cmdline)", "initrd (.initrd)"},
	} {
		var names []string
		for _, e := range measurements[Register(pcr)].Events {
			names = append(names, e.Name)
		}
		for _, name := range want {
			if !slices.Contains(names, name) {
				t.Errorf("pcr %d: %q is not in %q", pcr, name, names)
			}
		}
	}
	for _, pcr := range []uint32{8, 12, 15} {
		if events := measurements[Register(pcr)].Events; len(events) > 0 {
			t.Errorf("pcr %d, which nothing was measured into, has events %v", pcr, events)
		}
	}
	head, events := split(t, log)
	if !bytes.Equal(join(head, events), log) {
		t.Error("the tests' own encoding is not the log's")
	}
}

// Case 27: each event by itself, in each way that changes it.
func TestEachEventThatIsTamperedWithIsRefused(t *testing.T) {
	log, values := genuineLog(t)
	head, events := split(t, log)
	for i, e := range events {
		later := slices.IndexFunc(events[i+1:], func(o rawEvent) bool {
			return o.pcr == e.pcr && !bytes.Equal(o.digest, e.digest)
		})
		for name, tamper := range map[string]func([]rawEvent) []rawEvent{
			"its digest is edited": func(l []rawEvent) []rawEvent { l[i].digest = flip(e.digest, 0); return l },
			"it is dropped":        func(l []rawEvent) []rawEvent { return slices.Delete(l, i, i+1) },
			"it stands twice":      func(l []rawEvent) []rawEvent { return slices.Insert(l, i, e) },
			"it is another PCR's":  func(l []rawEvent) []rawEvent { l[i].pcr ^= 1; return l },
			"it is said to extend nothing": func(l []rawEvent) []rawEvent {
				l[i].kind = 3 // EV_NO_ACTION
				return l
			},
			"it is moved behind a later one": func(l []rawEvent) []rawEvent {
				if later >= 0 {
					l[i], l[i+1+later] = l[i+1+later], l[i]
				} else {
					l[i].digest = flip(e.digest, 31)
				}
				return l
			},
			"its digest is cut": func(l []rawEvent) []rawEvent { l[i].digest = e.digest[:31]; return l },
		} {
			_, err := explain(values, join(head, tamper(slices.Clone(events))))
			if err == nil || !contains(err, "refused") {
				t.Errorf("event %d, %s: %v", i+1, name, err)
				continue
			}
			wantErr(t, err, ErrEventLog)
			if name != "its digest is cut" && !contains(err, "pcr") {
				t.Errorf("event %d, %s: the refusal names nothing: %v", i+1, name, err)
			}
		}
		if eventlog.DigestIsOfData(tcg.EventType(e.kind)) {
			l := slices.Clone(events)
			l[i].data = flip(e.data, len(e.data)-1)
			_, err := explain(values, join(head, l))
			wantErr(t, err, ErrEventLog)
			if want := "event #" + strconv.Itoa(i+1) + " ("; !contains(err, want) {
				t.Errorf("%v does not name %s", err, want)
			}
		}
	}
}

// Case 27.
func TestALogThatIsNotWholeIsRefused(t *testing.T) {
	log, values := genuineLog(t)
	head, events := split(t, log)
	for n := 1; n < len(log); n++ {
		if _, err := explain(values, log[:n]); err == nil {
			t.Errorf("cut after %d of %d bytes: accepted", n, len(log))
		}
	}
	for name, l := range map[string][]byte{
		"its header alone":            head,
		"without a header":            log[len(head):],
		"one event more":              join(head, append(slices.Clone(events), rawEvent{4, 0x80000003, make([]byte, 32), nil})),
		"the events backwards":        join(head, backwards(events)),
		"all events of one PCR gone":  join(head, slices.DeleteFunc(slices.Clone(events), func(e rawEvent) bool { return e.pcr == 4 })),
		"text":                        []byte("Spec ID Event03"),
		"a log of 100000 events":      join(head, slices.Repeat([]rawEvent{{pcr: 23, kind: 13, digest: make([]byte, 32)}}, 9000)),
		"a log of another TPM family": append(binary.LittleEndian.AppendUint32(make([]byte, 28), 4), 1, 2, 3, 4),
	} {
		if _, err := explain(values, l); err == nil {
			t.Errorf("%s: accepted", name)
		} else {
			wantErr(t, err, ErrEventLog)
		}
	}
}

func backwards(events []rawEvent) []rawEvent {
	out := slices.Clone(events)
	slices.Reverse(out)
	return out
}

// What comes behind the padding of a log is not looked at.
func TestPaddingIsNoEvent(t *testing.T) {
	log, values := genuineLog(t)
	before, err := explain(values, log)
	if err != nil {
		t.Fatal(err)
	}
	for name, pad := range map[string][]byte{"ones": bytes.Repeat([]byte{0xff}, 4096)} {
		after, err := explain(values, append(bytes.Clone(log), pad...))
		if err != nil || !maps.EqualFunc(before, after, func(a, b attestation.Measurement) bool { return slices.Equal(a.Events, b.Events) }) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := explain(values, append(bytes.Clone(log), make([]byte, 7)...)); err == nil {
		t.Error("half an event is accepted")
	}
}

// Case 27: 10 MB.
func TestAnEventLogThatIsTooLargeIsRefused(t *testing.T) {
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	for name, size := range map[string]int{"10 MB": 10 << 20, "one byte too many": MaxEventLog + 1} {
		t.Run(name, func(t *testing.T) {
			x := exchange{evidence: func(e *attestv1.TPMEvidence) { e.EventLog = make([]byte, size) }}
			wantErr(t, x.runErr(t, p, v), ErrEventLogTooLarge)
		})
	}
	path := filepath.Join(t.TempDir(), "log")
	if err := os.WriteFile(path, make([]byte, MaxEventLog+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := (exchange{}).run(t, newIssuer(t, p, IssuerOptions{EventLog: path}), v); err == nil {
		t.Error("an issuer sends a log that no verifier takes")
	}
}

// Case 27, from the TPM to the claims: the fixture's boot, replayed into a TPM.
func TestTheLogOfAnotherBootIsRefused(t *testing.T) {
	log, _ := genuineLog(t)
	head, events := split(t, log)
	p := swtpm.New(t, nil)
	v := newVerifier(t, trustOf(t, p))
	path := filepath.Join(t.TempDir(), "log")
	write := func(log []byte) {
		if err := os.WriteFile(path, log, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	i := newIssuer(t, p, IssuerOptions{EventLog: path})
	write(log)
	_, err := exchange{}.run(t, i, v) // nothing was measured into this TPM
	wantErr(t, err, ErrEventLog)
	replayInto(t, p, events)
	claims, err := exchange{}.run(t, i, v)
	if err != nil || len(claims.Measurements["pcr7"].Events) != 6 || claims.Facts["event_log"] != true {
		t.Fatalf("%+v, %v", claims, err)
	}
	other := slices.Clone(events)
	other[27].data = []byte("console=ttyS0 init=/bin/sh")
	sum := sha256.Sum256(other[27].data)
	other[27].digest = sum[:]
	write(join(head, other))
	_, err = exchange{}.run(t, i, v)
	wantErr(t, err, ErrEventLog)
	if !contains(err, "pcr 11") {
		t.Errorf("%v does not name the register", err)
	}
}

func replayInto(t testing.TB, p *swtpm.TPM, events []rawEvent) {
	t.Helper()
	dev, err := OpenDevice(p.Device)
	if err != nil {
		t.Fatal(err)
	}
	defer dev.Close()
	for _, e := range events {
		must[*tpm2.PCRExtendResponse](t)(tpm2.PCRExtend{
			PCRHandle: tpm2.AuthHandle{Handle: tpm2.TPMHandle(e.pcr), Auth: tpm2.PasswordAuth(nil)},
			Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: e.digest}}},
		}.Execute(dev))
	}
}

func TestTheBootPhasesOfSystemdAreFoundInTheirOrder(t *testing.T) {
	log, values := genuineLog(t)
	parsed, err := ParseEventLog(log)
	if err != nil {
		t.Fatal(err)
	}
	extend := func(words ...string) []byte {
		v := values[11]
		for _, w := range words {
			sum := sha256.Sum256([]byte(w))
			v = Extend(v, sum[:])
		}
		return v
	}
	events, err := parsed.Explain(11, extend("enter-initrd", "leave-initrd", "sysinit"))
	if err != nil || !strings.HasSuffix(events[len(events)-1].Name, "sysinit") {
		t.Errorf("%v, %v", events, err)
	}
	for _, words := range [][]string{{"leave-initrd"}, {"sysinit", "sysinit"}, {"enter-initrd", "evil"}, {"ready"}} {
		_, err := parsed.Explain(11, extend(words...))
		wantErr(t, err, ErrEventLog)
	}
}
