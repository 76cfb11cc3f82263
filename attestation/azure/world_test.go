package azure

import (
	"context"
	"errors"
	"net/http/httptest"
	"sync"
	"testing"
	"time"

	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-tpm/tpm2"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tdx"
	"github.com/keyagent/keyagent/test/sim/amd"
	synthetic "github.com/keyagent/keyagent/test/sim/azurehcl"
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

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) || !errors.Is(err, attestation.ErrRefused) {
		t.Helper()
		t.Errorf("%v, want: %v", err, want)
	}
}

// vendors are the makers of hardware that all tests share.
type vendors struct {
	amd   *amd.Authority
	intel *intel.World
	crl   []byte
}

var theVendors = sync.OnceValues(func() (v vendors, err error) {
	if v.amd, err = amd.New(amd.Options{Product: "Genoa"}); err != nil {
		return v, err
	}
	if v.crl, err = v.amd.FreshCRL(); err != nil {
		return v, err
	}
	v.intel, err = intel.New(time.Now().Add(-time.Hour))
	return v, err
})

// Get implements endorsement.Source: AMD's list, and Intel's service.
func (v vendors) Get(ctx context.Context, r endorsement.Request) (endorsement.Document, error) {
	if r.Name == "snp-crl-Genoa" {
		return endorsement.Document{Body: v.crl}, nil
	}
	return (&intel.PCS{World: v.intel}).Get(ctx, r)
}

// vm is a confidential VM with its vTPM and its host.
type vm struct {
	*synthetic.Machine
	t    testing.TB
	tpm  *swtpm.TPM
	imds *synthetic.IMDS
	opts IssuerOptions
}

func newVM(t testing.TB, kind attestation.Kind, change ...func(*synthetic.Machine)) *vm {
	t.Helper()
	m := hardware(t, kind)
	for _, c := range change {
		c(m)
	}
	return provision(t, m, nil)
}

func hardware(t testing.TB, kind attestation.Kind) *synthetic.Machine {
	t.Helper()
	w := must[vendors](t)(theVendors())
	m := &synthetic.Machine{ID: "D270E56B-F668-4990-A5BC-9B624576841D"}
	if kind == attestation.TDX {
		m.TDX, m.Fields = must[*intel.Machine](t)(w.intel.Machine(intel.DefaultPlatform())), intel.DefaultFields()
		return m
	}
	m.SNP = must[*amd.Chip](t)(w.amd.Chip(amd.ChipOptions{}))
	m.SNPReport = amd.Report{Policy: abi.SnpPolicy{ABIMajor: 1}}
	return m
}

func provision(t testing.TB, m *synthetic.Machine, template func(*tpm2.TPMTPublic)) *vm {
	t.Helper()
	v := &vm{Machine: m, t: t, tpm: swtpm.New(t, nil), imds: &synthetic.IMDS{Machine: m}}
	if err := m.Provision(v.tpm.Device, template); err != nil {
		t.Fatal(err)
	}
	host := httptest.NewServer(v.imds)
	t.Cleanup(host.Close)
	v.opts = IssuerOptions{Device: v.tpm.Device, EventLog: t.TempDir() + "/none", IMDS: host.URL,
		Endorsements: must[vendors](t)(theVendors())}
	return v
}

// verifier trusts the synthetic vendors.
func verifier(t testing.TB, change ...func(*VerifierOptions)) *Verifier {
	t.Helper()
	w := must[vendors](t)(theVendors())
	opts := VerifierOptions{
		SNP: must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: w.amd.Trust})),
		TDX: must[*tdx.Verifier](t)(tdx.NewVerifier(tdx.VerifierOptions{
			Trust: func() tdx.Trust {
				return tdx.Trust{Roots: []tdx.Root{{Name: "lab", Certificate: w.intel.Root.Certificate}}}
			},
		})),
		PCRs: func() []uint32 { return []uint32{0, 7, 11} },
	}
	for _, c := range change {
		c(&opts)
	}
	return must[*Verifier](t)(NewVerifier(opts))
}

var binder = attestation.Binder{1, 2, 3}

// evidence is what the VM answers to the verifier's question.
func (m *vm) evidence(v *Verifier) *attestv1.AzureEvidence {
	m.t.Helper()
	i := must[*Issuer](m.t)(NewIssuer(m.opts))
	a := must[attestation.Attempt](m.t)(i.Begin(m.t.Context()))
	defer a.Close()
	q := must[attestation.Question](m.t)(v.Begin(m.t.Context(), a.Offer()))
	e := &attestv1.AzureEvidence{}
	if err := proto.Unmarshal(must[[]byte](m.t)(a.Evidence(m.t.Context(), q.Ask(), binder)), e); err != nil {
		m.t.Fatal(err)
	}
	return e
}

func verify(t testing.TB, v *Verifier, e *attestv1.AzureEvidence) ([]attestation.Claims, error) {
	t.Helper()
	q := must[attestation.Question](t)(v.Begin(context.Background(), nil))
	return q.Verify(context.Background(), must[[]byte](t)(proto.Marshal(e)), binder)
}

// shared is evidence of one VM of a kind, for all tests that only change it.
func shared(t testing.TB, kind attestation.Kind) (*synthetic.Machine, *attestv1.AzureEvidence) {
	t.Helper()
	known.Lock()
	defer known.Unlock()
	k, ok := known.of[kind]
	if !ok {
		m := newVM(t, kind)
		k = machineEvidence{m.Machine, m.evidence(verifier(t))}
		known.of[kind] = k
	}
	return k.machine, proto.Clone(k.evidence).(*attestv1.AzureEvidence)
}

type machineEvidence struct {
	machine  *synthetic.Machine
	evidence *attestv1.AzureEvidence
}

var known = struct {
	sync.Mutex
	of map[attestation.Kind]machineEvidence
}{of: map[attestation.Kind]machineEvidence{}}
