//go:build umlguest

package disks

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/attestation/tpm"
)

// pcr15 is the register of the node's TPM.
func (m *machine) pcr15(t *testing.T) []byte {
	t.Helper()
	dev := must[transport.TPMCloser](t)(tpm.OpenDevice(m.tpm.Device))
	defer dev.Close()
	rsp := must[*tpm2.PCRReadResponse](t)(tpm2.PCRRead{PCRSelectionIn: tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{
		{Hash: tpm2.TPMAlgSHA256, PCRSelect: tpm2.PCClientCompatible.PCRs(15)},
	}}}.Execute(dev))
	return rsp.PCRValues.Digests[0].Buffer
}

var measuredDigest = regexp.MustCompile(`digest=([0-9a-f]{64})`)

// extended wants the register to have got one more event, and returns its digest.
func (m *machine) extended(t *testing.T, before []byte, said string) []byte {
	t.Helper()
	found := measuredDigest.FindAllStringSubmatch(said, -1)
	if len(found) != 1 {
		t.Fatalf("%d measurements:\n%s", len(found), tail(said))
	}
	digest := must[[]byte](t)(hex.DecodeString(found[0][1]))
	if got, want := m.pcr15(t), tpm.Extend(before, digest); !bytes.Equal(got, want) {
		t.Errorf("pcr 15 is %x, %x and %x make %x", got, before, digest, want)
	}
	return digest
}

// emptyEventLog is a firmware's log that says that it has SHA-256 digests, and no more.
func emptyEventLog() []byte {
	id := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2, 1, 0, 0, 0, 0x0b, 0, 32, 0, 0)
	out := binary.LittleEndian.AppendUint32(nil, 0)
	out = binary.LittleEndian.AppendUint32(out, 3) // EV_NO_ACTION
	out = append(out, make([]byte, 20)...)
	return append(binary.LittleEndian.AppendUint32(out, uint32(len(id))), id...)
}

// A volume that is opened is in PCR 15, once for each mapping. A profile that demands it
// fits afterwards, and refuses the machine before.
func TestDiskAnOpenVolumeIsMeasured(t *testing.T) {
	m := first(t)
	m.eventLog = filepath.Join(t.TempDir(), "eventlog")
	t.Cleanup(func() { m.eventLog = "" })
	check(t, os.WriteFile(m.eventLog, emptyEventLog(), 0o600))
	removed(t, "v-measured", "after-it")
	m.configure(t, "{id: v-measured, device: "+disk(t, diskSize)+", format: true, measure: true}",
		"{id: after-it, device: "+disk(t, diskSize)+", format: true, on_request: true}")
	start := m.pcr15(t)
	a := m.start(t)
	a.waitFor(t, `msg=ready`)
	digest := m.extended(t, start, a.log.String())

	// Neither an agent that starts again nor another request measures it again.
	a.kill()
	once := m.pcr15(t)
	a = m.start(t)
	a.waitFor(t, `msg=ready`)
	m.must(t, "unlock", "v-measured", "--socket", filepath.Join(m.dir, "agent.sock"))
	if got := m.pcr15(t); !bytes.Equal(got, once) || strings.Contains(a.log.String(), "volume is measured") {
		t.Errorf("pcr 15 went from %x to %x:\n%s", once, got, tail(a.log.String()))
	}

	// A profile demands it.
	demand := func(digest []byte) {
		t.Helper()
		text := fmt.Sprintf(policy, m.maker.IssuerPath())
		text = strings.ReplaceAll(text, "profiles: [node]", "profiles: [later, node]")
		text = strings.Replace(text, "profiles:\n", fmt.Sprintf(`profiles:
  - name: later
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
      measured_volumes: [{volume: v-measured, accept: ["%x"]}]
`, digest), 1)
		text += `  - {name: later, profiles: [later], volumes: ["after-*"], operations: [open, format]}` + "\n"
		m.reload(t, text)
	}
	t.Cleanup(func() { m.reload(t, fmt.Sprintf(policy, m.maker.IssuerPath())) })
	socket := filepath.Join(m.dir, "agent.sock")
	demand(bytes.Repeat([]byte{0xab}, 32))
	if out, code := m.run(t, "format", "after-it", "--socket", socket); code != 7 && code != 6 {
		t.Errorf("another volume's digest is demanded: exit code %d\n%s", code, out)
	}
	demand(digest)
	m.must(t, "format", "after-it", "--socket", socket)

	// Closed and opened again, it is measured again, as the same.
	m.must(t, "close", "after-it", "--socket", socket)
	m.must(t, "close", "v-measured", "--socket", socket)
	a.kill()
	out := m.must(t, "unlock", "v-measured", "--standalone")
	if again := m.extended(t, once, out); !bytes.Equal(again, digest) {
		t.Errorf("it was %x, and is %x", digest, again)
	}
	m.must(t, "close", "v-measured", "--standalone")
}

// reload gives the key service another policy.
func (w *world) reload(t *testing.T, text string) {
	t.Helper()
	before := strings.Count(w.log.String(), "policy in force")
	w.write(t, "policy.yaml", text)
	check(t, w.process.Process.Signal(syscall.SIGHUP))
	eventually(t, "the policy is read again", func() bool { return strings.Count(w.log.String(), "policy in force") > before })
}

// refusing is a TPM that does everything but extend.
func refusing(t *testing.T, device string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "tpm")
	l := must[net.Listener](t)(net.Listen("unix", path))
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			relayTPM(c, strings.TrimPrefix(device, "unix:"))
		}
	}()
	return "unix:" + path
}

func relayTPM(c net.Conn, to string) {
	defer c.Close()
	real, err := net.Dial("unix", to)
	if err != nil {
		return
	}
	defer real.Close()
	message := func(from io.Reader) []byte {
		head := make([]byte, 10)
		if _, err := io.ReadFull(from, head); err != nil {
			return nil
		}
		all := append(head, make([]byte, binary.BigEndian.Uint32(head[2:])-10)...)
		if _, err := io.ReadFull(from, all[10:]); err != nil {
			return nil
		}
		return all
	}
	for {
		command := message(c)
		if command == nil {
			return
		}
		answer := []byte{0x80, 0x01, 0, 0, 0, 10, 0, 0, 1, 1} // TPM_RC_FAILURE
		if tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) != tpm2.TPMCCPCRExtend {
			_, _ = real.Write(command)
			answer = message(real)
		}
		if _, err := c.Write(answer); err != nil {
			return
		}
	}
}

// A mapping that could not be measured does not stay, nor does its lease.
func TestDiskAVolumeThatCannotBeMeasuredIsClosedAgain(t *testing.T) {
	m := first(t)
	device, good := disk(t, diskSize), m.tpm.Device
	removed(t, "v-unmeasured")
	volume := "{id: v-unmeasured, device: " + device + ", format: true, measure: true}"
	m.configure(t, volume)
	m.tpm.Device = refusing(t, good)
	m.configure(t, volume)
	m.tpm.Device = good
	before := m.pcr15(t)
	for range 2 { // created, and opened
		m.fails(t, 1, "measure the volume", "unlock", "v-unmeasured", "--standalone")
		if mapped("v-unmeasured") || !bytes.Equal(m.pcr15(t), before) {
			t.Errorf("it is mapped: %v, pcr 15 is %x", mapped("v-unmeasured"), m.pcr15(t))
		}
		if left, _ := filepath.Glob(filepath.Join(m.dir, "state", "v-unmeasured.json")); len(left) > 0 {
			t.Errorf("it is remembered: %v", left)
		}
	}
	_, nodes := lab()
	other := nodes[1]
	other.configure(t, "{id: v-unmeasured, device: "+device+"}")
	other.must(t, "unlock", "v-unmeasured", "--standalone")
	other.must(t, "close", "v-unmeasured", "--standalone")
}
