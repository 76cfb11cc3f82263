package kinds

import (
	"context"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/atls"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/lab/pki"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/intel"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func must[T any](t testing.TB) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// What ties a vTPM to the hardware comes instead of its parts; otherwise all
// that is there is shown.
func TestTheStrongestEvidenceIsChosen(t *testing.T) {
	for _, tt := range []struct{ found, used []attestation.Kind }{
		{[]attestation.Kind{"tpm"}, []attestation.Kind{"tpm"}},
		{[]attestation.Kind{"snp", "tpm"}, []attestation.Kind{"snp", "tpm"}},
		{[]attestation.Kind{"tdx", "tpm"}, []attestation.Kind{"tdx", "tpm"}},
		{[]attestation.Kind{"azure", "tpm"}, []attestation.Kind{"azure"}},
		{[]attestation.Kind{"svsm", "snp", "tpm"}, []attestation.Kind{"svsm"}},
		{[]attestation.Kind{"snp", "nitro", "tpm"}, []attestation.Kind{"snp", "nitro", "tpm"}},
		{nil, nil},
	} {
		findings := []Finding{{Kind: "azure"}, {Kind: "svsm"}, {Kind: "snp"}, {Kind: "tdx"}, {Kind: "nitro"}, {Kind: "tpm"}}
		for n := range findings {
			findings[n].Found = slices.Contains(tt.found, findings[n].Kind)
		}
		All().choose(findings)
		var used []attestation.Kind
		for _, f := range findings {
			if f.Used {
				used = append(used, f.Kind)
			}
			if f.Found != f.Used && !strings.Contains(f.String(), "there, not used") {
				t.Errorf("%s does not say why it is not used", f)
			}
		}
		if !slices.Equal(used, tt.used) {
			t.Errorf("of %v: uses %v, want %v", tt.found, used, tt.used)
		}
	}
}

func TestAMachineWithoutHardwareSaysWhatItLookedFor(t *testing.T) {
	_, findings, err := All().Issuers(t.Context(), IssuerOptions{TPM: tpm.IssuerOptions{Device: "/dev/no-such-tpm"}})
	if !errors.Is(err, attestation.ErrNoDevice) || len(findings) < 5 {
		t.Fatalf("%v, %v", findings, err)
	}
	for _, f := range findings {
		if f.Found || f.Used || f.Why == "" {
			t.Errorf("%+v", f)
		}
	}
}

func TestEvidenceThatIsPinnedIsExactlyThat(t *testing.T) {
	issuers, findings, err := All().Issuers(t.Context(), IssuerOptions{Kinds: []attestation.Kind{attestation.SNP, attestation.TPM}})
	if err != nil || len(issuers) != 2 || issuers[0].Kind() != attestation.SNP || len(findings) != 2 {
		t.Errorf("%v, %v, %v", issuers, findings, err)
	}
	if _, _, err := All().Issuers(t.Context(), IssuerOptions{Kinds: []attestation.Kind{"sgx"}}); err == nil {
		t.Error("an unknown kind is pinned")
	}
	for _, bad := range []string{"sgx", "", "snp,snp"} {
		if _, err := All().Parse(strings.Split(bad, ",")); err == nil || !strings.Contains(err.Error(), "hint: ") {
			t.Errorf("%q: %v", bad, err)
		}
	}
}

func TestEndorsementsAreConfiguredStrictly(t *testing.T) {
	for _, bad := range []EndorsementConfig{
		{Cache: "relative"}, {Ask: []string{"nvidia"}}, {Ask: []string{"none", "amd"}},
		{Mirrors: map[string]string{"nvidia": "https://m"}}, {Mirrors: map[string]string{"amd": "m"}},
	} {
		if err := bad.Check(); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
	if _, err := (EndorsementConfig{Ask: []string{"amd"}, Mirrors: map[string]string{"amd": "http://192.0.2.1/"}}).Open(); err == nil {
		t.Error("a mirror without TLS in the network is accepted")
	}
}

// Who may be asked is asked through its mirror; who may not is not.
func TestOnlyVendorsThatAreNamedAreAsked(t *testing.T) {
	asked := 0
	mirror := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked++; _, _ = w.Write([]byte("x")) }))
	defer mirror.Close()
	request := endorsement.Request{Name: "x", URL: snp.KDS + "/vcek/v1/Milan/crl"}
	mirrors := map[string]string{"amd": mirror.URL, "intel": mirror.URL}
	for _, tt := range []struct {
		ask, unset []string
		asked      int
	}{{nil, nil, 0}, {[]string{"none"}, []string{"amd"}, 0}, {[]string{"intel"}, nil, 0}, {nil, []string{"amd"}, 1}, {[]string{"amd"}, nil, 1}} {
		asked = 0
		source := must[*endorsement.Cache](t)(EndorsementConfig{Ask: tt.ask, Mirrors: mirrors}.Open(tt.unset...))
		_, err := source.Get(t.Context(), request)
		if asked != tt.asked || (err == nil) != (tt.asked == 1) {
			t.Errorf("ask %v, unset %v: asked %d times, %v", tt.ask, tt.unset, asked, err)
		}
		if err := source.Close(); err != nil {
			t.Error(err)
		}
	}
}

// composite is a service that demands an SNP report and a TPM's quote.
type composite struct {
	t      *testing.T
	ca     *pki.Authority
	server *atls.ServerConfig
}

func newComposite(t *testing.T, chip *amd.Chip, p *swtpm.TPM) *composite {
	t.Helper()
	dir := t.TempDir()
	var amdPEM strings.Builder
	for _, c := range [][]byte{chip.ARK.Raw, chip.ASK.Raw} {
		_ = pem.Encode(&amdPEM, &pem.Block{Type: "CERTIFICATE", Bytes: c})
	}
	for name, text := range map[string]string{
		"amd.pem": amdPEM.String(),
		"policy.yaml": fmt.Sprintf(`version: 1
lifetime: 1h
trust:
  snp: {roots: [{name: amd, product: Genoa, file: amd.pem}]}
  tpm: {roots: [{name: lab, file: %s}]}
profiles:
  - name: both
    snp:
      trust: ["root:amd"]
      products: [Genoa]
      signers: [vcek]
      measurement: {accept: ["a1%094d"]}
      min_tcb: {bootloader: 4, tee: 1, snp: 24, microcode: 219}
      any_chip: true
      allow: [multi-socket, alias-check-incomplete, visible-ciphertext, rapl]
    tpm:
      trust: ["root:lab"]
      bank: sha256
      event_log: optional
      pcrs: [{pcr: 4, accept: ["f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"]}]
grants:
  - {name: all, profiles: [both], volumes: ["*"], operations: [open]}
`, p.Authority.IssuerPath(), 0),
	} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	pol := must[*policy.Policy](t)(LoadPolicy(filepath.Join(dir, "policy.yaml")))
	verifiers := must[[]attestation.Verifier](t)(All().Verifiers(VerifierOptions{Policy: func() *policy.Policy { return pol }}))
	c := &composite{t: t, ca: must[*pki.Authority](t)(pki.NewAuthority())}
	cert := must[tls.Certificate](t)(c.ca.Server("service"))
	c.server = &atls.ServerConfig{
		Certificate: func() (*tls.Certificate, error) { return &cert, nil },
		Clients:     &atls.Peers{Verifiers: verifiers, Demand: pol.Demand, Appraiser: appraiser{pol}},
	}
	return c
}

type appraiser struct{ p *policy.Policy }

func (a appraiser) Appraise(_ context.Context, v *attestation.Verified) (time.Duration, error) {
	_, err := a.p.Appraise(v)
	return a.p.Lifetime(), err
}

// show runs one connection and returns the service's verdict.
func (c *composite) show(issuers ...attestation.Issuer) (*attestation.Verified, error) {
	c.t.Helper()
	var outcome atls.Outcome
	c.server.Observe = func(o atls.Outcome) { outcome = o }
	a, b := net.Pipe()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if conn, err := atls.Server(c.t.Context(), b, c.server); err == nil {
			conn.Close()
		}
		b.Close()
	}()
	conn, err := atls.Client(c.t.Context(), a, &atls.ClientConfig{
		ServerName: "service", RootCAs: c.ca.Pool(), Identity: must[*atls.Identity](c.t)(atls.NewIdentity()), Issuers: issuers})
	if err == nil {
		conn.Close()
	}
	a.Close()
	<-done
	return outcome.Peer, outcome.Err
}

// kept shows the evidence of another exchange instead of its own.
type kept struct {
	attestation.Issuer
	evidence []byte
	record   bool
}

func (k *kept) Begin(ctx context.Context) (attestation.Attempt, error) {
	a, err := k.Issuer.Begin(ctx)
	return keptAttempt{a, k}, err
}

type keptAttempt struct {
	attestation.Attempt
	k *kept
}

func (a keptAttempt) Evidence(ctx context.Context, ask []byte, b attestation.Binder) ([]byte, error) {
	if !a.k.record {
		return a.k.evidence, nil
	}
	data, err := a.Attempt.Evidence(ctx, ask, b)
	a.k.evidence = data
	return data, err
}

// Case 29: a policy that demands hardware and a TPM is not satisfied by halves of
// two machines, nor by one half.
func TestTwoHalvesOfTwoMachinesAreRefused(t *testing.T) {
	authority := must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa"}))
	chip := must[*amd.Chip](t)(authority.Chip(amd.ChipOptions{}))
	kds := httptest.NewServer(amd.NewKDS(chip))
	defer kds.Close()
	source := must[*endorsement.HTTP](t)(amd.Source(kds.URL))
	guest := &amd.Guest{Chip: chip, Table: chip.Table(), Report: amd.Report{Measurement: [48]byte{0xa1}, Policy: abi.SnpPolicy{ABIMajor: 1}}}
	hw := must[*snp.Issuer](t)(snp.NewIssuer(snp.IssuerOptions{TSM: guest.TSM(), Endorsements: source}))

	p := swtpm.New(t, nil)
	other := swtpm.New(t, p.Authority)
	vtpm := func(p *swtpm.TPM) attestation.Issuer {
		if err := swtpm.Extend(p.Device, 4, make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		return must[*tpm.Issuer](t)(tpm.NewIssuer(tpm.IssuerOptions{Device: p.Device, EventLog: filepath.Join(t.TempDir(), "none")}))
	}
	mine, theirs := vtpm(p), vtpm(other)
	c := newComposite(t, chip, p)

	v, err := c.show(hw, mine)
	if err != nil || len(v.All()) != 2 {
		t.Fatalf("the whole machine: %v", err)
	}
	if _, err := c.show(mine); !errors.Is(err, policy.ErrKinds) {
		t.Errorf("the TPM alone: %v", err)
	}
	if _, err := c.show(hw); !errors.Is(err, policy.ErrKinds) {
		t.Errorf("the hardware alone: %v", err)
	}

	// The other machine attests itself as a whole, and its halves are kept.
	keptHW, keptTPM := &kept{Issuer: hw, record: true}, &kept{Issuer: theirs, record: true}
	if _, err := c.show(keptHW, keptTPM); err != nil {
		t.Fatal(err)
	}
	keptHW.record, keptTPM.record = false, false
	if _, err := c.show(keptHW, mine); !errors.Is(err, snp.ErrReportData) {
		t.Errorf("another exchange's report: %v", err)
	}
	if _, err := c.show(hw, keptTPM); !errors.Is(err, tpm.ErrBinder) {
		t.Errorf("another exchange's quote: %v", err)
	}
	// Another TPM's evidence behind this one's offer.
	if _, err := c.show(hw, &kept{Issuer: mine, evidence: keptTPM.evidence}); !errors.Is(err, tpm.ErrSignature) {
		t.Errorf("another TPM's quote: %v", err)
	}
}

// Quotes come with the rest of the kernel's buffer, and with nothing else.
func TestReportsOfOtherToolsAreImported(t *testing.T) {
	world := must[*intel.World](t)(intel.New(time.Now()))
	td := must[*intel.Machine](t)(world.Machine(intel.DefaultPlatform()))
	quote := must[[]byte](t)(td.Quote(intel.DefaultFields()))
	text := hex.EncodeToString(quote)
	for name, data := range map[string][]byte{
		"as it is": quote, "padded": append(slices.Clone(quote), make([]byte, 3000)...),
		"in hex": []byte(text), "in hex with 0x": []byte("0x" + text + "\n"), "in hex and lines": []byte(text[:64] + "\r\n" + text[64:]),
	} {
		s, err := Import(data)
		if err != nil || s.Items[0].Kind != "tdx" {
			t.Errorf("%s: %v", name, err)
		}
	}
	hcl := func(of string) []byte {
		return must[[]byte](t)(os.ReadFile("../azure/testdata/hcl-report-" + of + ".bin"))
	}
	if s, err := Import(hcl("snp")); err != nil || s.Items[0].Kind != "snp" {
		t.Errorf("an SNP report in a report of Azure's HCL: %v", err)
	}
	for name, data := range map[string][]byte{
		"with something behind it": append(slices.Clone(quote), 1), "nothing": nil, "text": []byte("quote"), "0x": []byte("0x"), "half a digit": []byte(text + "0"),
		"a TD report": hcl("tdx"), "the beginning of a report of Azure's HCL": hcl("snp")[:900],
	} {
		if _, err := Import(data); err == nil {
			t.Errorf("%s is imported", name)
		}
	}
}
