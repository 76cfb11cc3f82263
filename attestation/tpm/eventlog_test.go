package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"fmt"
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
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// genuineLog is the log of one boot of a unified kernel image under OVMF, with
// the PCRs that the kernel read afterwards.
func genuineLog(t testing.TB) ([]byte, map[uint32][]byte) {
	t.Helper()
	return readBoot(t, "ovmf")
}

func readBoot(t testing.TB, name string) ([]byte, map[uint32][]byte) {
	t.Helper()
	log := must[[]byte](t)(os.ReadFile("testdata/" + name + ".eventlog"))
	var text map[string]string
	if err := json.Unmarshal(must[[]byte](t)(os.ReadFile("testdata/"+name+".pcrs.json")), &text); err != nil {
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

// splitBanks reads the events of a log with more banks than one, in SHA-256.
func splitBanks(t testing.TB, log []byte) (out []rawEvent) {
	t.Helper()
	events, err := eventlog.Parse(log, eventlog.SHA256, maxEvents)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range events {
		if e.Type != tcg.NoAction {
			out = append(out, rawEvent{uint32(e.Index), uint32(e.Type), e.Digest, e.Data})
		}
	}
	return out
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
	measurements, err := explained(values, log)
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
		for _, e := range measurements[register(pcr)].Events {
			names = append(names, e.Name)
		}
		for _, name := range want {
			if !slices.Contains(names, name) {
				t.Errorf("pcr %d: %q is not in %q", pcr, name, names)
			}
		}
	}
	for _, pcr := range []uint32{8, 12, 15} {
		if events := measurements[register(pcr)].Events; len(events) > 0 {
			t.Errorf("pcr %d, which nothing was measured into, has events %v", pcr, events)
		}
	}
	head, events := split(t, log)
	if !bytes.Equal(join(head, events), log) {
		t.Error("the tests' own encoding is not the log's")
	}
}

// explained is what a policy demands that needs the log of every register.
func explained(values map[uint32][]byte, log []byte) (map[string]attestation.Measurement, error) {
	all, err := explain(values, log, nil)
	for _, pcr := range slices.Sorted(maps.Keys(values)) {
		m := all[register(pcr)]
		if !bytes.Equal(m.Value, values[pcr]) {
			return nil, fmt.Errorf("pcr %d: a log changes the value to %x", pcr, m.Value)
		}
		if m.Unexplained != "" && err == nil {
			if len(m.Events) > 0 {
				return nil, fmt.Errorf("pcr %d: events beside %s", pcr, m.Unexplained)
			}
			err = fmt.Errorf("%w: %s", ErrEventLog, m.Unexplained)
		}
	}
	return all, err
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
			_, err := explained(values, join(head, tamper(slices.Clone(events))))
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
			all, err := explained(values, join(head, l))
			if err != nil {
				t.Fatal(err)
			}
			shown := all[register(e.pcr)].Events
			n := slices.IndexFunc(shown, func(e attestation.Event) bool { return e.Seq == i+1 })
			if !strings.Contains(shown[n].Detail, "not what was measured") {
				t.Errorf("event %d shows what nothing measured: %+v", i+1, shown[n])
			}
		}
	}
}

// Case 27.
func TestALogThatIsNotWholeIsRefused(t *testing.T) {
	log, values := genuineLog(t)
	head, events := split(t, log)
	for n := 1; n < len(log); n++ {
		if _, err := explained(values, log[:n]); err == nil {
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
		if _, err := explained(values, l); err == nil {
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
	before, err := explained(values, log)
	if err != nil {
		t.Fatal(err)
	}
	for name, pad := range map[string][]byte{"ones": bytes.Repeat([]byte{0xff}, 4096)} {
		after, err := explained(values, append(bytes.Clone(log), pad...))
		if err != nil || !maps.EqualFunc(before, after, func(a, b attestation.Measurement) bool { return slices.Equal(a.Events, b.Events) }) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := explained(values, append(bytes.Clone(log), make([]byte, 7)...)); err == nil {
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
	why := func() string {
		t.Helper()
		claims, err := exchange{}.run(t, i, v)
		if err != nil {
			t.Fatal(err)
		}
		if m := claims.Measurements["pcr11"]; m.Unexplained != "" && len(m.Events) == 0 {
			return m.Unexplained
		}
		return ""
	}
	if why() == "" { // nothing was measured into this TPM
		t.Error("the log of another boot explains an empty register")
	}
	replayInto(t, p, events)
	claims, err := exchange{}.run(t, i, v)
	if err != nil || len(claims.Measurements["pcr7"].Events) != 6 || claims.Facts["event_log"] != true || claims.Measurements["pcr11"].Unexplained != "" {
		t.Fatalf("%+v, %v", claims, err)
	}
	other := slices.Clone(events)
	other[27].data = []byte("console=ttyS0 init=/bin/sh")
	sum := sha256.Sum256(other[27].data)
	other[27].digest = sum[:]
	write(join(head, other))
	if text := why(); !strings.Contains(text, "pcr 11") {
		t.Errorf("%q does not name the register", text)
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

func extendWords(value []byte, words ...string) []byte {
	for _, w := range words {
		sum := sha256.Sum256([]byte(w))
		value = Extend(value, sum[:])
	}
	return value
}

func TestTheBootPhasesOfSystemdAreFoundInTheirOrder(t *testing.T) {
	log, values := genuineLog(t)
	parsed, err := ParseEventLog(log)
	if err != nil {
		t.Fatal(err)
	}
	for _, words := range [][]string{
		{"enter-initrd", "leave-initrd", "sysinit"}, {"nvpcr-separator", "enter-initrd"}, {"enter-initrd", "nvpcr-separator", "leave-initrd", "sysinit", "ready"},
	} {
		events, err := parsed.Explain(11, extendWords(values[11], words...))
		if err != nil || !strings.HasSuffix(events[len(events)-1].Name, words[len(words)-1]) {
			t.Errorf("%v: %v, %v", words, events, err)
		}
	}
	for _, words := range [][]string{{"leave-initrd"}, {"sysinit", "sysinit"}, {"enter-initrd", "evil"}, {"ready"}, {"os-separator"}, {"nvpcr-separator", "nvpcr-separator"}} {
		_, err := parsed.Explain(11, extendWords(values[11], words...))
		wantErr(t, err, ErrEventLog)
	}
}

// systemd 261 and later extend these registers behind the firmware's log, and one
// more word follows in PCR 9 since 259.
func TestSystemdsSeparatorsFollowTheFirmwaresLog(t *testing.T) {
	log, values := genuineLog(t)
	separated := maps.Clone(values)
	for pcr, v := range values {
		if OSSeparated(pcr) {
			separated[pcr] = extendWords(v, "os-separator")
		}
	}
	separated[9] = extendWords(separated[9], "nvpcr-separator")
	all, err := explained(separated, log)
	if err != nil {
		t.Fatal(err)
	}
	for pcr := range values {
		events := all[register(pcr)].Events
		if got := len(events) > 0 && strings.Contains(events[len(events)-1].Name, "separator "); got != OSSeparated(pcr) {
			t.Errorf("pcr %d: %v", pcr, events)
		}
	}
	for pcr, v := range values {
		if pcr == 9 || !OSSeparated(pcr) {
			continue
		}
		wrong := maps.Clone(values)
		wrong[pcr] = extendWords(v, "os-separator", "os-separator")
		if m, err := explain(wrong, log, nil); err != nil || pcr <= lastFirmwarePCR && m[register(pcr)].Unexplained == "" {
			t.Errorf("pcr %d is explained by a word that stands twice: %v", pcr, err)
		}
	}
}

// A TPM into which a boot of systemd 261 was replayed, from the TPM to the claims:
// the machine is explained, with the words of user space, and nothing but the policy
// decides on its values.
func TestAMachineWithSystemd261Attests(t *testing.T) {
	log, values := readBoot(t, "uki-stub262")
	events := splitBanks(t, log)
	p := swtpm.New(t, nil)
	replayInto(t, p, events)
	var words []rawEvent
	for pcr := range uint32(24) {
		if OSSeparated(pcr) {
			sum := sha256.Sum256([]byte(OSSeparator))
			words = append(words, rawEvent{pcr: pcr, digest: sum[:]})
		}
	}
	phase := sha256.Sum256([]byte("enter-initrd"))
	replayInto(t, p, append(words, rawEvent{pcr: 11, digest: phase[:]}))
	dir := t.TempDir()
	path := filepath.Join(dir, "log")
	if err := os.WriteFile(path, log, 0o600); err != nil {
		t.Fatal(err)
	}
	trust := trustOf(t, p)
	trust.PCRs = []uint32{0, 1, 2, 3, 4, 5, 6, 7, 9, 11, 12, 14}
	for name, user := range map[string]string{"without systemd's own log": filepath.Join(dir, "none"), "with it": filepath.Join(dir, "user")} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(filepath.Join(dir, "user"), userLog(userRecord(4, "os-separator", OSSeparator), userRecord(11, "phase", "enter-initrd")), 0o600); err != nil {
				t.Fatal(err)
			}
			claims, err := exchange{}.run(t, newIssuer(t, p, IssuerOptions{EventLog: path, UserspaceLog: user}), newVerifier(t, trust))
			if err != nil {
				t.Fatal(err)
			}
			for _, pcr := range trust.PCRs {
				m := claims.Measurements[register(pcr)]
				last := attestation.Event{}
				if n := len(m.Events); n > 0 {
					last = m.Events[n-1]
				}
				if m.Unexplained != "" || !strings.Contains(last.Name, "separator "+OSSeparator) && last.Name != "boot phase enter-initrd" {
					t.Errorf("pcr %d: %q, last event %+v", pcr, m.Unexplained, last)
				}
			}
			if v := claims.Measurements["pcr4"].Value; !bytes.Equal(v, extendWords(values[4], OSSeparator)) {
				t.Errorf("pcr 4 is %x", v)
			}
		})
	}
}

func userLog(records ...string) []byte {
	return []byte("\x1e" + strings.Join(records, "\n\x1e") + "\n")
}

func userRecord(pcr int, kind, text string) string {
	sum := sha256.Sum256([]byte(text))
	return fmt.Sprintf(`{"pcr":%d,"digests":[{"hashAlg":"sha1","digest":"00"},{"hashAlg":"sha256","digest":"%x"}],"content_type":"systemd","content":{"eventType":%q,"string":%q,"bootId":"x","timestamp":1}}`,
		pcr, sum, kind, text)
}

// Where systemd left a log of its own, what it measured need not be known words.
func TestSystemdsOwnLogExplainsWhatFollows(t *testing.T) {
	log, values := genuineLog(t)
	const nv = "nvpcr-init:hardware:0x1d10200:00"
	user := userLog(userRecord(9, "os-separator", "os-separator"), `{"nv_index":1,"digests":[]}`, userRecord(9, "nvpcr-init", nv),
		userRecord(9, "nvpcr-separator", "nvpcr-separator"), userRecord(15, "machine-id", "machine-id:1"), userRecord(9, "phase", "later than the quote"))
	quoted := maps.Clone(values)
	quoted[9] = extendWords(values[9], "os-separator", nv, "nvpcr-separator")
	quoted[15] = extendWords(values[15], "machine-id:1")
	all, err := explain(quoted, log, user)
	if err != nil || all["pcr9"].Unexplained != "" || all["pcr15"].Unexplained != "" {
		t.Fatalf("%+v, %v", all["pcr9"], err)
	}
	if events := all["pcr9"].Events; !strings.Contains(events[len(events)-2].Name, nv) && !strings.Contains(events[len(events)-2].Detail, nv) {
		t.Errorf("%+v", events)
	}
	if len(all["pcr15"].Events) != 1 {
		t.Errorf("%+v", all["pcr15"])
	}
	// A log that was made up leads nowhere, and takes no other register's events.
	all, err = explain(quoted, log, userLog(userRecord(9, "phase", "made up")))
	if err != nil || all["pcr9"].Unexplained == "" || all["pcr4"].Unexplained != "" {
		t.Errorf("%+v, %v", all["pcr9"], err)
	}
	for name, bad := range map[string][]byte{
		"text": []byte("\x1etext"), "a register that is none": userLog(`{"pcr":24}`), "a short digest": userLog(`{"pcr":1,"digests":[{"hashAlg":"sha256","digest":"00"}]}`),
		"too much": bytes.Repeat([]byte{0x1e}, MaxUserspaceLog+1), "too many records": bytes.Repeat([]byte("\x1e{}"), maxUserEvents+2),
	} {
		parsed := must[*EventLog](t)(ParseEventLog(log))
		if err := parsed.AddUserspace(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// A log that went on for weeks is sent from its start, in whole records.
func TestALongLogOfSystemdsIsCutBetweenRecords(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	record := userRecord(15, "login", strings.Repeat("x", 500))
	if err := os.WriteFile(path, userLog(slices.Repeat([]string{record}, 1000)...), 0o600); err != nil {
		t.Fatal(err)
	}
	got := must[[]byte](t)(readUserspaceLog(path))
	if len(got) > MaxUserspaceLog || len(got) < MaxUserspaceLog-1000 {
		t.Fatalf("%d bytes", len(got))
	}
	log, _ := genuineLog(t)
	parsed := must[*EventLog](t)(ParseEventLog(log))
	if err := parsed.AddUserspace(got); err != nil || len(parsed.Userspace(15)) < 50 {
		t.Errorf("%d records, %v", len(parsed.Userspace(15)), err)
	}
	if got, err := readUserspaceLog(path + ".none"); got != nil || err != nil {
		t.Errorf("no log: %d bytes, %v", len(got), err)
	}
}

// Boots of other stubs and loaders, as QEMU had them.
func TestLogsOfOtherBootChainsAreExplained(t *testing.T) {
	for name, applications := range map[string]int{"uki-stub262": 1, "uki-stub257p": 2, "uki-stub252sdboot": 3} {
		log, values := readBoot(t, name)
		all, err := explained(values, log)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		n := 0
		for _, e := range all["pcr4"].Events {
			if e.Name == "EFI application" {
				n++
			}
		}
		if n != applications {
			t.Errorf("%s: %d applications, want %d", name, n, applications)
		}
	}
}

// What real firmware writes: an event whose digest is not that of its data, and a
// log that lacks an event of PCR 0. Each costs what it touches and nothing else.
func TestABadEventCostsItsOwnExplanationAlone(t *testing.T) {
	log, values := genuineLog(t)
	head, events := split(t, log)
	version := slices.IndexFunc(events, func(e rawEvent) bool { return e.kind == uint32(tcg.SCRTMVersion) })
	other := slices.Clone(events)
	other[version].data = []byte("2\x00.\x005\x00\x00\x00")
	if _, err := explained(values, join(head, other)); err != nil {
		t.Errorf("a description that is wrong: %v", err)
	}
	all, err := explain(values, join(head, slices.Delete(slices.Clone(events), version, version+1)), nil)
	if err != nil || all["pcr0"].Unexplained == "" || len(all["pcr0"].Events) > 0 || !bytes.Equal(all["pcr0"].Value, values[0]) {
		t.Fatalf("an event that is missing: %+v, %v", all["pcr0"], err)
	}
	for pcr := range values {
		if pcr != 0 && all[register(pcr)].Unexplained != "" {
			t.Errorf("pcr %d: %s", pcr, all[register(pcr)].Unexplained)
		}
	}
}

func TestALogOfOtherBanksSaysWhatToEnable(t *testing.T) {
	for name, want := range map[string]string{"log-sha1-legacy": "SHA-1", "log-sha384-only": "SHA-384"} {
		log := must[[]byte](t)(os.ReadFile("testdata/" + name + ".bin"))
		_, err := ParseEventLog(log)
		wantErr(t, err, ErrEventLog)
		if !contains(err, want) || !contains(err, "enable the SHA-256 bank") {
			t.Errorf("%s: %v", name, err)
		}
		facts := map[string]any{}
		logFacts(log, facts)
		if facts["event_log"] != false || !strings.Contains(facts["event_log_error"].(string), want) {
			t.Errorf("%s: %v", name, facts)
		}
	}
}

func TestAnEventOfNoRegisterDoesNotEndTheLog(t *testing.T) {
	parsed := must[*EventLog](t)(ParseEventLog(must[[]byte](t)(os.ReadFile("testdata/log-noaction-pcr-ffffffff.bin"))))
	for pcr, n := range map[uint32]int{0: 2, 4: 1, 7: 1} {
		_, events, err := parsed.Replay(pcr)
		if err != nil || len(events) != n {
			t.Errorf("pcr %d: %d events, want %d, %v", pcr, len(events), n, err)
		}
	}
}
