//go:build umlguest

package hardware

import (
	"bytes"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/azurehcl"
	"github.com/keyagent/keyagent/test/sim/intel"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// These run inside a guest, which hardware_test.go boots: a machine's program is
// the released one, its disk is real dm-crypt, and its processor is synthetic.

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// one bit of what the hardware signed is changed while spoiled is set.
type spoiler struct {
	configfsi.Client
	spoiled atomic.Bool
	at      int
}

func (s *spoiler) ReadFile(name string) ([]byte, error) {
	data, err := s.Client.ReadFile(name)
	if err == nil && filepath.Base(name) == "outblob" && s.spoiled.Load() {
		data = bytes.Clone(data)
		data[s.at] ^= 1
	}
	return data, err
}

// machine is one confidential VM and the key service that it asks.
type machine struct {
	t      *testing.T
	dir    string
	trust  string   // the trust section of the policy
	tpm    string   // who vouches for its TPM, if it has one
	agent  string   // lines of the agent's configuration
	flags  []string // of keyagent evidence, the same for a TPM and a mirror
	port   string
	device string
	log    bytes.Buffer
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	m := &machine{t: t, dir: t.TempDir()}
	ca := must[*pki.Authority](t)(pki.NewAuthority())
	check(t, ca.Write(m.dir, must[tls.Certificate](t)(ca.Server("127.0.0.1"))))
	l := must[net.Listener](t)(net.Listen("tcp", "127.0.0.1:0"))
	_, m.port, _ = net.SplitHostPort(l.Addr().String())
	check(t, l.Close())
	return m
}

// hardware serves c where the kernel has its reports.
func (m *machine) hardware(c configfsi.Client) {
	m.t.Helper()
	unmount := must[func() error](m.t)(Serve(TSM, c))
	m.t.Cleanup(func() { check(m.t, unmount()) })
}

// mirror lets the machine ask h instead of a vendor.
func (m *machine) mirror(vendor string, h http.Handler) {
	s := httptest.NewServer(h)
	m.t.Cleanup(s.Close)
	m.agent += fmt.Sprintf("endorsements: {ask: [%s], mirrors: {%s: \"%s\"}}\n", vendor, vendor, s.URL)
	m.flags = append(m.flags, "--with-endorsements", "--mirror", vendor+"="+s.URL)
}

// vtpm gives the machine a software TPM.
func (m *machine) vtpm() *swtpm.TPM {
	m.t.Helper()
	p := swtpm.New(m.t, nil)
	m.agent += fmt.Sprintf("tpm: {device: \"%s\", event_log: /nonexistent}\n", p.Device)
	m.flags = append(m.flags, "--device", p.Device, "--event-log", "/nonexistent")
	check(m.t, swtpm.Extend(p.Device, 4, make([]byte, 32)))
	return p
}

// run runs keyagent and returns its output and exit code.
func (m *machine) run(args ...string) (string, int) {
	m.t.Helper()
	cmd := exec.Command(os.Getenv("KEYAGENT_TEST_PROGRAM"), args...)
	cmd.Dir = m.dir
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatal(err)
	}
	return string(out), cmd.ProcessState.ExitCode()
}

func (m *machine) mustRun(args ...string) string {
	m.t.Helper()
	out, code := m.run(args...)
	if code != 0 {
		m.t.Fatalf("keyagent %s: exit code %d\n%s\nthe service said:\n%s", strings.Join(args, " "), code, out, m.log.String())
	}
	return out
}

func (m *machine) write(name, text string) {
	m.t.Helper()
	check(m.t, os.WriteFile(filepath.Join(m.dir, name), []byte(text), 0o600))
}

// measure makes the policy from what the machine itself says, as an operator does
// with one that is trusted.
func (m *machine) measure() {
	m.t.Helper()
	out := m.mustRun(append([]string{"evidence", "--pcrs", "0,4", "--file", "evidence.json"}, m.flags...)...)
	m.t.Logf("evidence:\n%s", out)
	args := []string{"measure", "--evidence", "evidence.json", "--name", "cvm", "--pcrs", "0,4"}
	if m.tpm != "" {
		args = append(args, "--trust", m.tpm)
	}
	profile := strings.ReplaceAll(m.mustRun(args...), "\n", "\n  ")
	m.write("policy.yaml", "version: 1\nlifetime: 1h\ntrust:\n"+m.trust+"profiles:\n  "+profile+
		"\ngrants:\n  - {name: data, profiles: [cvm], volumes: [data], operations: [open, format]}\n")
	m.mustRun("policy", "check", "policy.yaml")
	m.t.Logf("%s", m.mustRun("verify", "--policy", "policy.yaml", "evidence.json"))
}

// serve runs the key service until the test ends.
func (m *machine) serve() {
	m.t.Helper()
	m.write("serve.yaml", fmt.Sprintf(`listen: 127.0.0.1:%s
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
`, m.port))
	cmd := exec.Command(os.Getenv("KEYAGENT_TEST_PROGRAM"), "serve", "--config", "serve.yaml", "--init-master-secret")
	cmd.Dir, cmd.Stderr = m.dir, &m.log
	check(m.t, cmd.Start())
	m.t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	deadline := time.Now().Add(30 * time.Second)
	for {
		if c, err := net.Dial("tcp", "127.0.0.1:"+m.port); err == nil {
			c.Close()
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("the service does not listen:\n%s", m.log.String())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// disk gives the machine a blank disk.
func (m *machine) disk() {
	m.t.Helper()
	image := filepath.Join(m.dir, "disk.img")
	f := must[*os.File](m.t)(os.Create(image))
	check(m.t, f.Truncate(64<<20))
	check(m.t, f.Close())
	out, err := exec.Command("losetup", "--find", "--show", image).CombinedOutput()
	if err != nil {
		m.t.Fatalf("%v: %s", err, out)
	}
	m.device = strings.TrimSpace(string(out))
	m.t.Cleanup(func() { _ = exec.Command("losetup", "--detach", m.device).Run() })
	m.write("agent.yaml", fmt.Sprintf(`servers: [{address: "127.0.0.1:%s", ca: ca.pem}]
state_dir: %s/state
socket: %s/agent.sock
callers: [{uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}]
retry: {budget: 30s, first: 50ms, max: 500ms}
%svolumes: [{id: data, device: %s, format: true, filesystem: ext4, no_mmp: true, mount: %s/data}]
`, m.port, m.dir, m.dir, m.agent, m.device, m.dir))
	m.mustRun("agent", "--config", "agent.yaml", "--check")
	check(m.t, os.Mkdir(filepath.Join(m.dir, "data"), 0o755))
}

func (m *machine) unlock() (string, int) {
	m.t.Helper()
	return m.run("unlock", "--standalone", "--config", "agent.yaml")
}

// opens opens the disk, and finds or leaves a file on it.
func (m *machine) opens(first bool) {
	m.t.Helper()
	if out, code := m.unlock(); code != 0 {
		m.t.Fatalf("exit code %d\n%s\nthe service said:\n%s", code, out, m.log.String())
	}
	note := filepath.Join(m.dir, "data", "note")
	if first {
		check(m.t, os.WriteFile(note, []byte("kept"), 0o600))
	} else if got, err := os.ReadFile(note); string(got) != "kept" {
		m.t.Fatalf("%q, %v", got, err)
	}
	m.mustRun("close", "--standalone", "--config", "agent.yaml", "data")
}

// refused wants no key, and the disk as it was.
func (m *machine) refused(why string) {
	m.t.Helper()
	before := must[[]byte](m.t)(os.ReadFile(filepath.Join(m.dir, "disk.img")))
	out, code := m.unlock()
	if code != 6 {
		m.t.Errorf("exit code %d, want 6\n%s", code, out)
	}
	if _, err := os.Stat("/dev/mapper/data"); err == nil {
		m.t.Error("the disk is open")
	}
	if !bytes.Equal(before, must[[]byte](m.t)(os.ReadFile(filepath.Join(m.dir, "disk.img")))) {
		m.t.Error("the disk was written to")
	}
	if !strings.Contains(m.log.String(), why) {
		m.t.Errorf("the service does not say %q:\n%s", why, m.log.String())
	}
	if strings.Contains(out, why) {
		m.t.Errorf("the node is told why: %s", out)
	}
}

// story is what happens to each machine.
func (m *machine) story(spoil, mend func(), why string) {
	m.t.Helper()
	m.measure()
	m.serve()
	m.disk()
	m.opens(true)
	m.opens(false)
	spoil()
	m.refused(why)
	mend()
	m.opens(false)
}

func newChip(t testing.TB) *amd.Chip {
	t.Helper()
	authority := must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa"}))
	return must[*amd.Chip](t)(authority.Chip(amd.ChipOptions{}))
}

// amdTrust is the policy's word on the authority of a chip.
func (m *machine) amdTrust(chip *amd.Chip) {
	m.t.Helper()
	m.write("amd.pem", string(intel.PEM(chip.ARK, chip.ASK, chip.ASVK)))
	m.trust += "  snp: {roots: [{name: amd, product: Genoa, file: amd.pem}]}\n"
}

func guestOn(chip *amd.Chip) *amd.Guest {
	return &amd.Guest{Chip: chip, Report: amd.Report{
		Measurement: [48]byte{0xA1, 0xB2}, Policy: abi.SnpPolicy{ABIMajor: 1, SMT: true, SingleSocket: true},
	}, Table: chip.Table()}
}

func TestGuestSNPAlone(t *testing.T) {
	m, chip := newMachine(t), newChip(t)
	m.amdTrust(chip)
	m.mirror("amd", amd.NewKDS(chip))
	s := &spoiler{Client: guestOn(chip).TSM(), at: 0x90}
	m.hardware(s)
	m.story(func() { s.spoiled.Store(true) }, func() { s.spoiled.Store(false) }, "report signature does not verify")
}

func TestGuestTDXAlone(t *testing.T) {
	m := newMachine(t)
	world := must[*intel.World](t)(intel.New(time.Now()))
	td := must[*intel.Machine](t)(world.Machine(intel.DefaultPlatform()))
	m.write("intel.pem", string(intel.PEM(world.Root.Certificate)))
	m.trust = "  tdx: {roots: [{name: intel, file: intel.pem}]}\n"
	m.mirror("intel", &intel.PCS{World: world})
	s := &spoiler{Client: td.TSM(intel.DefaultFields()), at: 200}
	m.hardware(s)
	m.story(func() { s.spoiled.Store(true) }, func() { s.spoiled.Store(false) }, "signature")
}

// Google's shape: a vTPM whose attestation key the cloud certified, beside a TD.
func TestGuestGoogle(t *testing.T) {
	m := newMachine(t)
	world := must[*intel.World](t)(intel.New(time.Now()))
	td := must[*intel.Machine](t)(world.Machine(intel.DefaultPlatform()))
	m.write("intel.pem", string(intel.PEM(world.Root.Certificate)))
	m.trust = "  tdx: {roots: [{name: intel, file: intel.pem}]}\n"
	m.mirror("intel", &intel.PCS{World: world})
	m.hardware(td.TSM(intel.DefaultFields()))

	p := m.vtpm()
	cloud := must[*swtpm.Cloud](t)(swtpm.NewCloud())
	m.write("cloud.pem", string(intel.PEM(cloud.Certificate)))
	m.trust += "  tpm: {ak_roots: [{name: cloud, file: cloud.pem}]}\n"
	m.tpm = "ak-root:cloud"
	template := swtpm.RSAAKTemplate()
	public := must[*tpm2.TPMTPublic](t)(swtpm.Primary(p.Device, template, 0))
	cert := must[[]byte](t)(cloud.Certify(public, swtpm.Instance{Zone: "lab-1", ProjectNumber: 7, ProjectID: "lab", InstanceID: 11, InstanceName: "node"}))
	check(t, swtpm.WriteNV(p.Device, 0x01c10000, cert))
	check(t, swtpm.WriteNV(p.Device, 0x01c10001, tpm2.Marshal(template)))

	spoiled := bytes.Clone(cert)
	spoiled[len(spoiled)-1] ^= 1
	m.story(func() { check(t, swtpm.WriteNV(p.Device, 0x01c10000, spoiled)) },
		func() { check(t, swtpm.WriteNV(p.Device, 0x01c10000, cert)) }, "attestation key is not vouched for")
}

// An SVSM's shape: the report vouches for the vTPM below the guest.
func TestGuestSVSM(t *testing.T) {
	m, chip := newMachine(t), newChip(t)
	m.amdTrust(chip)
	m.mirror("amd", amd.NewKDS(chip))
	p := m.vtpm()
	m.tpm = "svsm"
	g := guestOn(chip)
	g.Manifest = tpm2.Marshal(*must[*tpm2.TPMTPublic](t)(swtpm.Primary(p.Device, tpm2.RSAEKTemplate, 0)))
	s := &spoiler{Client: g.TSM(), at: 0x90}
	m.hardware(s)
	m.story(func() { s.spoiled.Store(true) }, func() { s.spoiled.Store(false) }, "report signature does not verify")
}

// Azure's shape: the hardware's report is in the vTPM and covers its key.
func TestGuestAzure(t *testing.T) {
	m, chip := newMachine(t), newChip(t)
	m.amdTrust(chip)
	m.mirror("amd", amd.NewKDS(chip))
	p := m.vtpm()
	m.tpm = "azure"
	vm := &azurehcl.Machine{SNP: chip, SNPReport: guestOn(chip).Report, ID: "5B7C6A9E-0000-4000-8000-000000000001"}
	check(t, vm.Provision(p.Device, nil))
	imds := httptest.NewServer(&azurehcl.IMDS{Machine: vm})
	t.Cleanup(imds.Close)
	m.agent += fmt.Sprintf("azure: {metadata: \"%s\"}\n", imds.URL)
	m.flags = append(m.flags, "--metadata", imds.URL)

	honest := must[[]byte](t)(vm.Report(vm.AK))
	spoiled := bytes.Clone(honest)
	spoiled[0x20+0x90] ^= 1
	put := func(report []byte) func() {
		return func() { check(t, swtpm.WriteNV(p.Device, 0x01400001, report)) }
	}
	m.story(put(spoiled), put(honest), "report signature does not verify")
}
