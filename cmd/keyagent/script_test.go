package main

import (
	"bytes"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"net"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"filippo.io/age"
	"github.com/google/go-sev-guest/abi"
	sevdata "github.com/google/go-sev-guest/verify/testdata"
	tdxdata "github.com/google/go-tdx-guest/testing/testdata"
	"github.com/google/go-tpm/tpm2"
	"github.com/hiddeco/sshsig"
	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/proto"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/internal/recovery"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/emulator"
	"github.com/keyagent/keyagent/test/sim/intel"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"keyagent": func() { os.Exit(run(os.Args[1:], os.Stdout, os.Stderr)) },
	})
}

// TestScripts runs testdata/script: a file for each behaviour of a command, as
// a user sees it.
func TestScripts(t *testing.T) {
	lab := &laboratory{t: t}
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		Setup:               lab.setup,
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":    exits,
			"waitport": waitPort,
			"zeros":    zeros,
			"digestof": digestOf,
			"agekey":   ageKey,
			"sshkey":   sshKey,
			"sshsign":  sshSign,
			"withkeys": withKeys,
			"sumof":    sumOf,
			"kmscall":  kmsCall,
			"mkmaster": mkMaster,
			"etcd":     lab.etcd,
			"datakey":  dataKey,
		},
	})
}

// laboratory has one TPM for all scripts: each exchange leaves it as it was.
type laboratory struct {
	t    *testing.T
	once sync.Once
	tpm  *swtpm.TPM
	chip *amd.Chip
	kds  *httptest.Server
}

// setup gives a script a certificate, a TPM and a free port.
func (l *laboratory) setup(env *testscript.Env) error {
	l.once.Do(func() {
		l.tpm = swtpm.New(l.t, nil)
		l.measure()
		l.hardware()
	})
	ca, err := pki.NewAuthority()
	if err != nil {
		return err
	}
	cert, err := ca.Server("127.0.0.1")
	if err != nil {
		return err
	}
	if err := ca.Write(env.WorkDir, cert); err != nil {
		return err
	}
	maker, err := os.ReadFile(l.tpm.Authority.IssuerPath())
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(env.WorkDir, "maker.pem"), maker, 0o644); err != nil {
		return err
	}
	port, err := freePort()
	if err != nil {
		return err
	}
	env.Setenv("PORT", port)
	logs, err := filepath.Abs("../../attestation/tpm/testdata")
	if err != nil {
		return err
	}
	env.Setenv("LOGS", logs)
	env.Setenv("TPM", l.tpm.Device)
	env.Setenv("KDS", l.kds.URL)
	if err := l.writeHardware(env.WorkDir); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"good.yaml": fmt.Sprintf(`listen: 127.0.0.1:%s
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
`, port),
		"good-policy.yaml": fmt.Sprintf(`version: 1
lifetime: 1h
trust:
  tpm:
    roots: [{name: lab, file: maker.pem}]
profiles:
  - name: guest
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["%x"]}]
grants:
  - {name: data, profiles: [guest], volumes: ["data*"], operations: [open, format]}
`, tpm.Extend(make([]byte, 32), make([]byte, 32))),
		"agent.yaml": fmt.Sprintf(`servers: [{address: "127.0.0.1:%s", ca: ca.pem}]
tpm: {device: "%s", event_log: /nonexistent}
state_dir: %s/state
socket: %s/agent.sock
retry: {budget: 1s, first: 100ms, max: 200ms}
callers: [{uid: 0, operations: [open, format, close, status, list], volumes: ["*"]}]
volumes: [{id: data, device: %s/disk.img, name: keyagent-script}]
`, port, l.tpm.Device, env.WorkDir, env.WorkDir, env.WorkDir),
	} {
		for variant, change := range variants[name] {
			changed := strings.NewReplacer("$WORK", env.WorkDir, "$TPM", l.tpm.Device).Replace(strings.NewReplacer(change...).Replace(text))
			if err := os.WriteFile(filepath.Join(env.WorkDir, variant), []byte(changed), 0o644); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(env.WorkDir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	blank := make([]byte, 32<<20)
	full := slices.Concat([]byte("a file that somebody needs"), blank[:32<<20-26])
	for name, data := range map[string][]byte{"zeros.img": blank, "full.img": full, "full.copy": full} {
		if err := os.WriteFile(filepath.Join(env.WorkDir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// variants of the good files, each with one thing changed.
var variants = map[string]map[string][]string{
	"good-policy.yaml": {
		"strict-policy.yaml": {`accept: ["`, `accept: ["` + strings.Repeat("ab", 32) + `"]}, {pcr: 7, warn_only: true, allow_unextended: true, accept: ["`},
		"other-root.yaml":    {"maker.pem", "ca.pem"},
		"replicas.yaml":      {"grants:", "replicas: {profiles: [guest]}\ngrants:"},
	},
	"good.yaml": {
		"first.yaml":                 {"audit: audit.log", "audit: audit.log\nadmin: admin.sock\ntpm: {device: $TPM, event_log: /nonexistent}"},
		"second.yaml":                {"audit: audit.log", "audit: audit2.log\nadmin: admin2.sock\ntpm: {device: $TPM, event_log: /nonexistent}", "file=master.secret", "joined=true"},
		"constellation-service.yaml": {"?file=master.secret", "?file=master&salt=c29tZSBzYWx0&derivation=constellation"},
	},
	"agent.yaml": {
		"constellation.yaml": {
			"callers: [", `constellation: {socket: $WORK/c.sock}
callers: [{uid: 0, operations: [get-data-key], volumes: [data, "*-*-*-*-*", s3proxy-kek, "volume-*"]}, `,
			"name: keyagent-script", "name: keyagent-script, on_request: true",
		},
		"constellation-nobody.yaml": {"callers: [", `constellation: {socket: $WORK/c.sock}
callers: [`},
		"other-disk.yaml":   {"disk.img", "full.img"},
		"no-disk.yaml":      {"disk.img", "no-such-disk"},
		"other-volume.yaml": {"id: data", "id: secret"},
		"no-tpm.yaml":       {"tpm: {device: \"", "tpm: {device: \"/nonexistent/"},
		"wrong-pin.yaml":    {"ca: ca.pem", "pins: [\"sha256:" + strings.Repeat("ab", 32) + "\"]"},
	},
}

// measure gives PCR 4 a value, as a boot does: a register that nothing was
// measured into proves nothing.
func (l *laboratory) measure() {
	dev, err := tpm.OpenDevice(l.tpm.Device)
	if err != nil {
		l.t.Fatal(err)
	}
	defer dev.Close()
	if _, err := (tpm2.PCRExtend{
		PCRHandle: tpm2.AuthHandle{Handle: 4, Auth: tpm2.PasswordAuth(nil)},
		Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
	}).Execute(dev); err != nil {
		l.t.Fatal(err)
	}
}

func freePort() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer l.Close()
	return strconv.Itoa(l.Addr().(*net.TCPAddr).Port), nil
}

// exits CODE COMMAND...: runs a command and demands its exit code.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND...")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := 0
	if err != nil {
		var exit interface{ ExitCode() int }
		if e, ok := err.(interface{ ExitCode() int }); ok {
			exit = e
			code = exit.ExitCode()
		} else {
			ts.Fatalf("%v", err)
		}
	}
	if strconv.Itoa(code) != args[0] {
		ts.Fatalf("exit code %d, want %s", code, args[0])
	}
}

// waitport: waits until something listens on $PORT, and on the unix sockets that are named.
func waitPort(ts *testscript.TestScript, _ bool, sockets []string) {
	deadline := time.Now().Add(30 * time.Second)
	for {
		c, err := net.Dial("tcp", "127.0.0.1:"+ts.Getenv("PORT"))
		if err == nil {
			c.Close()
		}
		for _, name := range sockets {
			if c, dialErr := net.Dial("unix", ts.MkAbs(name)); dialErr == nil {
				c.Close()
			} else {
				err = dialErr
			}
		}
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("nothing listens on port %s", ts.Getenv("PORT"))
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// etcd: starts one, and sets STORAGE to a storage in it and PORT2 to a free port: what two key
// services need.
func (l *laboratory) etcd(ts *testscript.TestScript, _ bool, _ []string) {
	ts.Setenv("STORAGE", "storage://etcd?prefix=records&endpoints="+url.QueryEscape(emulator.Etcd(l.t)))
	port, err := freePort()
	ts.Check(err)
	ts.Setenv("PORT2", port)
}

// zeros FILE MIB: makes a blank disk image.
func zeros(ts *testscript.TestScript, _ bool, args []string) {
	if len(args) != 2 {
		ts.Fatalf("usage: zeros FILE MIB")
	}
	var mib int64
	_, err := fmt.Sscan(args[1], &mib)
	ts.Check(err)
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	ts.Check(f.Truncate(mib << 20))
	ts.Check(f.Close())
}

// sshkey NAME: writes a new SSH key to the file NAME, and sets NAME to its public half.
func sshKey(ts *testscript.TestScript, _ bool, args []string) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	ts.Check(err)
	block, err := ssh.MarshalPrivateKey(private, "")
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), pem.EncodeToMemory(block), 0o600))
	public, err := ssh.NewPublicKey(private.Public())
	ts.Check(err)
	ts.Setenv(args[0], strings.TrimSpace(string(ssh.MarshalAuthorizedKey(public))))
}

// sshsign NAME FILE SIGNATURE: what ssh-keygen -Y sign -n keyagent-recovery does.
func sshSign(ts *testscript.TestScript, _ bool, args []string) {
	signer, err := ssh.ParsePrivateKey([]byte(ts.ReadFile(args[0])))
	ts.Check(err)
	sig, err := sshsig.Sign(strings.NewReader(ts.ReadFile(args[1])), signer, sshsig.HashSHA512, recovery.Namespace)
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[2]), sshsig.Armor(sig), 0o600))
}

// withkeys FILE NAME...: adds those whose keys sshkey made to a configuration, as operators of
// whom two must approve.
func withKeys(ts *testscript.TestScript, _ bool, args []string) {
	text := ts.ReadFile(args[0]) + "recovery:\n  threshold: 2\n  operators:\n"
	for _, name := range args[1:] {
		text += fmt.Sprintf("    - {name: %s, key: %q}\n", strings.ToLower(name), ts.Getenv(name))
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}

// agekey NAME: writes a new identity of age to the file NAME, and sets NAME to its recipient.
func ageKey(ts *testscript.TestScript, _ bool, args []string) {
	id, err := age.GenerateX25519Identity()
	ts.Check(err)
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(id.String()+"\n"), 0o600))
	ts.Setenv(args[0], id.Recipient().String())
}

// digestof FILE: sets DIGEST to the SHA-256 of what the file holds in base64.
func digestOf(ts *testscript.TestScript, _ bool, args []string) {
	raw, err := base64.StdEncoding.DecodeString(strings.TrimSpace(ts.ReadFile(args[0])))
	ts.Check(err)
	ts.Setenv("DIGEST", fmt.Sprintf("%x", sha256.Sum256(raw)))
}

// sumof FILE: sets SUM to the SHA-256 of a file.
func sumOf(ts *testscript.TestScript, _ bool, args []string) {
	ts.Setenv("SUM", fmt.Sprintf("%x", sha256.Sum256([]byte(ts.ReadFile(args[0])))))
}

// hardware makes a chip, and the service of its maker.
func (l *laboratory) hardware() {
	l.t.Helper()
	authority, err := amd.New(amd.Options{Product: "Genoa"})
	if err != nil {
		l.t.Fatal(err)
	}
	if l.chip, err = authority.Chip(amd.ChipOptions{}); err != nil {
		l.t.Fatal(err)
	}
	l.kds = httptest.NewServer(amd.NewKDS(l.chip))
	l.t.Cleanup(l.kds.Close)
}

// writeHardware gives a script reports: of the chip, with and without what its
// maker says of it, of the same chip with another launch, and real ones.
func (l *laboratory) writeHardware(dir string) error {
	report := amd.Report{Measurement: [48]byte{0xa1}, Policy: abi.SnpPolicy{ABIMajor: 1, SMT: true, SingleSocket: true}}
	whole, err := l.chip.Evidence(report)
	if err != nil {
		return err
	}
	report.Measurement[0] = 0xa2
	other, err := l.chip.Evidence(report)
	if err != nil {
		return err
	}
	report.Version = 2
	old, err := l.chip.Evidence(report)
	if err != nil {
		return err
	}
	bare := proto.CloneOf(whole)
	bare.Certificate, bare.Crl = nil, nil
	for name, e := range map[string]proto.Message{"snp.json": whole, "snp-other.json": other, "snp-bare.json": bare, "snp-old.json": old} {
		data, err := proto.Marshal(e)
		if err != nil {
			return err
		}
		if err := saved.Write(filepath.Join(dir, name), saved.Of(attestation.SNP, data, attestation.Binder{})); err != nil {
			return err
		}
	}
	genoa, err := os.ReadFile("../../attestation/snp/testdata/real/genoa-azure.report")
	if err != nil {
		return err
	}
	turin, err := os.ReadFile("../../attestation/snp/testdata/real/turin-v5.report")
	if err != nil {
		return err
	}
	masked := bytes.Clone(turin)
	clear(masked[0x1A0:0x1E0])
	for name, data := range map[string][]byte{
		"genoa.bin": genoa, "turin.bin": turin, "masked.bin": masked,
		"snp.bin": whole.Report, "snp-old.bin": old.Report, "amd.pem": intel.PEM(l.chip.ARK, l.chip.ASK),
		"milan.bin": sevdata.AttestationBytes, "tdx.bin": bytes.TrimSuffix(tdxdata.RawQuote, []byte("\nextra bytes(only for testing purpose)\n")),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}
