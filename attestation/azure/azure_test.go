package azure

import (
	"crypto/sha256"
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
)

func TestBothKindsOfHardwareAreAccepted(t *testing.T) {
	for _, kind := range []attestation.Kind{attestation.SNP, attestation.TDX} {
		t.Run(string(kind), func(t *testing.T) {
			m := newVM(t, kind)
			m.opts.Log = func(what string, err error) { t.Errorf("%s: %v", what, err) }
			if got, err := Detect(m.opts); got != kind || err != nil {
				t.Fatalf("%q, %v", got, err)
			}
			v := verifier(t)
			e := m.evidence(v)
			all, err := verify(t, v, e)
			if err != nil {
				t.Fatal(err)
			}
			verified := must[*attestation.Verified](t)(attestation.NewVerified(binder, time.Now(), all...))
			hw, _ := verified.Claims(kind)
			vtpm, _ := verified.Claims(attestation.TPM)
			az := verified.All()[0]
			if hw.Via != attestation.Azure || vtpm.Via != attestation.Azure || hw.Trust != "root:lab" || vtpm.Trust != "azure" ||
				len(vtpm.Measurements) != 3 || !strings.HasPrefix(vtpm.Epoch, "reset") || len(vtpm.Identity) != 64 {
				t.Errorf("%+v", all)
			}
			want := map[string]any{
				"vm_id": m.ID, "hcl_version": uint64(2), "isolation": string(kind), "secure_boot": true, "tpm_enabled": true,
				"console_enabled": false, "tpm_persisted": true, "token_verified": false,
				"root_cert_thumbprint": "6nZZnYaJc4KqUZ_yvA-mucFdYNouvlPnITnNMXsHl-0",
			}
			if az.Kind != attestation.Azure || az.Identity != m.ID || az.Trust != hw.Trust || !reflect.DeepEqual(az.Facts, want) {
				t.Errorf("%+v", az)
			}
			if az.EvidenceDigest != sha256.Sum256(must[[]byte](t)(proto.Marshal(e))) {
				t.Error("the digest is not that of the evidence")
			}
		})
	}
}

func TestEvidenceInAFileVerifies(t *testing.T) {
	m := newVM(t, attestation.SNP)
	s := must[*attestv1.Saved](t)(saved.Collect(t.Context(), []attestation.Issuer{must[*Issuer](t)(NewIssuer(m.opts))}, []uint32{0, 4}))
	v := verifier(t)
	all, err := saved.Verify(t.Context(), []attestation.Verifier{v}, s)
	if err != nil || len(all) != 3 || len(all[2].Measurements) != 2 {
		t.Errorf("%+v, %v", all, err)
	}
	if _, err := v.Restore(t.Context(), nil, []byte{0xff}, nil); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

// TestRealReportsAreUnderstood: two VMs of Azure.
func TestRealReportsAreUnderstood(t *testing.T) {
	for path, want := range map[string]struct {
		isolation attestation.Kind
		version   uint32
		id        string
		thumb     string
	}{
		"testdata/hcl-report-snp.bin": {attestation.SNP, 1, "BAEFD3E1-184B-4C4C-AB88-0BDAD260505F", ""},
		"testdata/hcl-report-tdx.bin": {attestation.TDX, 2, "D270E56B-F668-4990-A5BC-9B624576841D", "6nZZnYaJc4KqUZ_yvA-mucFdYNouvlPnITnNMXsHl-0"},
	} {
		r := must[*Report](t)(Parse(must[[]byte](t)(os.ReadFile(path))))
		facts := r.Claims().Facts
		if r.Isolation != want.isolation || r.Version != want.version || facts["vm_id"] != want.id || facts["root_cert_thumbprint"] != want.thumb ||
			facts["console_enabled"] != true || r.AK.N.BitLen() != 2048 || !r.coversRuntime() {
			t.Errorf("%s: %+v, %+v", path, r, facts)
		}
		if _, said := facts["tpm_persisted"]; said != (r.Version == 2) {
			t.Errorf("%s: tpm_persisted is there: %v", path, said)
		}
		s := must[*Summary](t)(Summarize(must[[]byte](t)(os.ReadFile(path))))
		if s.VM != want.id {
			t.Errorf("%+v", s)
		}
	}
}

// TestADirectReportIsNoAzureEvidence, and the other way round.
func TestADirectReportIsNoAzureEvidence(t *testing.T) {
	m, e := shared(t, attestation.SNP)
	v := verifier(t)
	r := m.SNPReport
	r.Data = binder
	direct := must[*attestv1.SNPEvidence](t)(m.SNP.Evidence(r))
	q := must[attestation.Question](t)(v.Begin(t.Context(), nil))
	_, err := q.Verify(t.Context(), must[[]byte](t)(proto.Marshal(direct)), binder)
	wantErr(t, err, ErrMalformed)

	inner := must[*Report](t)(Parse(e.HclReport))
	_, err = v.opts.SNP.VerifyReport(t.Context(), &attestv1.SNPEvidence{
		Report: inner.Hardware, Certificate: e.Snp.Certificate, Crl: e.Snp.Crl}, binder)
	wantErr(t, err, snp.ErrReportData)

	_, td := shared(t, attestation.TDX)
	_, err = v.opts.TDX.VerifyQuote(t.Context(), td.Tdx, binder)
	wantErr(t, err, tdx.ErrReportData)
}

func TestWhatIsNotSetIsAConfigurationError(t *testing.T) {
	w := verifier(t).opts
	for name, opts := range map[string]VerifierOptions{
		"nothing":             {},
		"no hardware":         {PCRs: w.PCRs},
		"no PCRs":             {SNP: w.SNP},
		"tokens of nobody":    {SNP: w.SNP, PCRs: w.PCRs, Token: func() *TokenOptions { return &TokenOptions{} }},
		"tokens without keys": {SNP: w.SNP, PCRs: w.PCRs, Token: func() *TokenOptions { return &TokenOptions{Issuer: "x"} }},
	} {
		v, err := NewVerifier(opts)
		if err == nil {
			_, err = v.Begin(t.Context(), nil)
		}
		if !errors.Is(err, ErrConfiguration) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, pcrs := range [][]uint32{nil, {24}, {7, 7}, {7, 0}} {
		v := verifier(t, func(o *VerifierOptions) { o.PCRs = func() []uint32 { return pcrs } })
		if _, err := v.Begin(t.Context(), nil); !errors.Is(err, ErrConfiguration) || errors.Is(err, attestation.ErrRefused) {
			t.Errorf("%v: %v", pcrs, err)
		}
	}
	for _, base := range []string{"169.254.169.254", "ftp://x", "http://", "http://user@x", "http://x/?q=1"} {
		if _, err := NewIssuer(IssuerOptions{IMDS: base}); !errors.Is(err, ErrConfiguration) {
			t.Errorf("%s: %v", base, err)
		}
	}
}

func TestHardwareThatIsNotConfiguredIsRefused(t *testing.T) {
	_, e := shared(t, attestation.SNP)
	_, err := verify(t, verifier(t, func(o *VerifierOptions) { o.SNP = nil }), e)
	wantErr(t, err, ErrHardware)
}

// A policy may trust nobody for one kind of hardware. A stranger who shows that kind
// is refused, and is no fault of the verifier's own side.
func TestHardwareThatNobodyVouchesForIsRefused(t *testing.T) {
	for _, kind := range []attestation.Kind{attestation.SNP, attestation.TDX} {
		_, e := shared(t, kind)
		v := verifier(t, func(o *VerifierOptions) {
			o.SNP = must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: func() snp.Trust { return snp.Trust{} }}))
			o.TDX = must[*tdx.Verifier](t)(tdx.NewVerifier(tdx.VerifierOptions{Trust: func() tdx.Trust { return tdx.Trust{} }}))
		})
		_, err := verify(t, v, e)
		wantErr(t, err, ErrHardware)
		wantErr(t, err, attestation.ErrRefused)
	}
}

// TestAHostThatAnswersBadly: attack 35. The certificate of the chip can come from
// elsewhere; a quote of a TD cannot, and that is an error of this machine's.
func TestAHostThatAnswersBadly(t *testing.T) {
	m := newVM(t, attestation.SNP)
	for name, fault := range map[string]http.HandlerFunc{
		"429":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTooManyRequests) },
		"500":      func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusInternalServerError) },
		"oversize": func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(make([]byte, maxAnswer+10)) },
		"no JSON":  func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("<html>")) },
		"nothing":  func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("{}")) },
		"elsewhere": func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, "http://192.0.2.1/", http.StatusFound)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m.imds.Fault = func(w http.ResponseWriter, r *http.Request) bool { fault(w, r); return true }
			var logged []string
			m.opts.Log = func(what string, _ error) { logged = append(logged, what) }
			if e := m.evidence(verifier(t)); len(e.Snp.Certificate) != 0 || len(logged) == 0 {
				t.Errorf("certificate of %d bytes, logged %q", len(e.Snp.Certificate), logged)
			}
		})
	}
	m = newVM(t, attestation.TDX)
	m.imds.Fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusServiceUnavailable)
		return true
	}
	i := must[*Issuer](t)(NewIssuer(m.opts))
	a := must[attestation.Attempt](t)(i.Begin(t.Context()))
	ask, _, _ := a.(attempt).SelfAsk([]uint32{0})
	if _, err := a.Evidence(t.Context(), ask, binder); err == nil || errors.Is(err, attestation.ErrRefused) {
		t.Error(err)
	}
}

func TestAHostThatHangsHoldsNobodyUpForLong(t *testing.T) {
	release := make(chan struct{})
	host := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
	}))
	defer host.Close()
	defer close(release)
	service := must[*imds](t)(newIMDS(host.URL))
	if service.client.Timeout != requestTimeout {
		t.Errorf("a request may take %s", service.client.Timeout)
	}
	service.client.Timeout = 50 * time.Millisecond
	start := time.Now()
	if _, _, err := service.certificate(t.Context()); err == nil || time.Since(start) > 5*time.Second {
		t.Errorf("%v after %s", err, time.Since(start))
	}
}

func TestAMachineOfSomebodyElseHasNoReport(t *testing.T) {
	m := newVM(t, attestation.SNP)
	if _, err := Detect(IssuerOptions{Device: "/does/not/exist"}); !errors.Is(err, attestation.ErrNoDevice) {
		t.Error(err)
	}
	m.tpm.Restart(t)
	if _, err := Detect(m.opts); err != nil {
		t.Errorf("NV memory is not that of the last boot: %v", err)
	}
}
