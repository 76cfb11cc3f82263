package maa

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	library "github.com/edgelesssys/go-azguestattestation/maa"
	"github.com/google/go-sev-guest/abi"
	"github.com/google/go-tpm-tools/proto/attest"
	pb "github.com/google/go-tpm-tools/proto/tpm"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/test/sim/amd"
	"github.com/keyagent/keyagent/test/sim/azurehcl"
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

const bootLog = "../../tpm/testdata/ovmf.eventlog"

// world is a VM on SEV-SNP, with its host and its provider.
type world struct {
	maker    *amd.Authority
	tpm      *swtpm.TPM
	imds     *azurehcl.IMDS
	provider *azurehcl.Provider
	opts     Options
}

func newWorld(t *testing.T) *world {
	t.Helper()
	w := &world{maker: must[*amd.Authority](t)(amd.New(amd.Options{Product: "Genoa"})), tpm: swtpm.New(t, nil)}
	m := &azurehcl.Machine{
		ID: "D270E56B-F668-4990-A5BC-9B624576841D", SNP: must[*amd.Chip](t)(w.maker.Chip(amd.ChipOptions{})),
		SNPReport: amd.Report{Policy: abi.SnpPolicy{ABIMajor: 1}},
	}
	w.imds = &azurehcl.IMDS{Machine: m}
	host := httptest.NewServer(w.imds)
	t.Cleanup(host.Close)
	w.provider = &azurehcl.Provider{Attestation: must[*azurehcl.Attestation](t)(azurehcl.NewAttestation("")), Machine: m}
	service := httptest.NewTLSServer(w.provider)
	t.Cleanup(service.Close)
	w.provider.Issuer = service.URL
	if err := errors.Join(m.Provision(w.tpm.Device, nil), m.Certify(w.tpm.Device, w.provider.Attestation)); err != nil {
		t.Fatal(err)
	}
	w.opts = Options{URL: service.URL, Device: w.tpm.Device, EventLog: bootLog, IMDS: host.URL, Client: service.Client()}
	return w
}

func (w *world) token(t *testing.T, nonce []byte) (string, error) {
	t.Helper()
	get, err := New(w.opts)
	if err != nil {
		t.Fatal(err)
	}
	return get(t.Context(), nonce)
}

// Get implements endorsement.Source: AMD's revocation list.
func (w *world) Get(context.Context, endorsement.Request) (endorsement.Document, error) {
	crl, err := w.maker.FreshCRL()
	return endorsement.Document{Body: crl}, err
}

// TestATokenIsPartOfTheEvidence: the provider checks all that it is told before it
// gives a token, and package azure accepts the token with the machine's evidence.
func TestATokenIsPartOfTheEvidence(t *testing.T) {
	w := newWorld(t)
	get, err := New(w.opts)
	if err != nil {
		t.Fatal(err)
	}
	issuer := must[*azure.Issuer](t)(azure.NewIssuer(azure.IssuerOptions{
		Device: w.tpm.Device, EventLog: filepath.Join(t.TempDir(), "none"), IMDS: w.opts.IMDS, Endorsements: w, Token: get,
		Log: func(what string, err error) { t.Errorf("%s: %v", what, err) },
	}))
	verifier := must[*azure.Verifier](t)(azure.NewVerifier(azure.VerifierOptions{
		SNP:  must[*snp.Verifier](t)(snp.NewVerifier(snp.VerifierOptions{Trust: w.maker.Trust})),
		PCRs: func() []uint32 { return []uint32{11} },
		Token: func() *azure.TokenOptions {
			return &azure.TokenOptions{Issuer: w.opts.URL, JWKS: func(context.Context) ([]byte, error) { return w.provider.JWKS() }}
		},
	}))
	a := must[attestation.Attempt](t)(issuer.Begin(t.Context()))
	defer a.Close()
	q := must[attestation.Question](t)(verifier.Begin(t.Context(), a.Offer()))
	binder := attestation.Binder{1, 2, 3}
	raw := must[[]byte](t)(a.Evidence(t.Context(), q.Ask(), binder))
	e := &attestv1.AzureEvidence{}
	if err := proto.Unmarshal(raw, e); err != nil {
		t.Fatal(err)
	}
	if e.GetToken() == "" {
		t.Fatal("no token")
	}
	claims, err := q.Verify(t.Context(), raw, binder)
	if err != nil {
		t.Fatal(err)
	}
	if claims[0].Facts["token_verified"] != true {
		t.Errorf("%+v", claims[0].Facts)
	}
}

// captured is a provider that keeps what it is sent and answers nothing of use.
type captured struct{ body []byte }

func (c *captured) Do(r *http.Request) (rsp *http.Response, err error) {
	c.body, err = io.ReadAll(r.Body)
	return &http.Response{Status: "418", StatusCode: http.StatusTeapot, Body: http.NoBody}, err
}

// attestationInfo unpacks a request.
func attestationInfo(t *testing.T, body []byte) map[string]any {
	t.Helper()
	var outer struct{ AttestationInfo string }
	if err := json.Unmarshal(body, &outer); err != nil {
		t.Fatal(err)
	}
	info := map[string]any{}
	if err := json.Unmarshal(must[[]byte](t)(base64.RawURLEncoding.DecodeString(outer.AttestationInfo)), &info); err != nil {
		t.Fatal(err)
	}
	return info
}

// TestTheRequestIsTheLibrarys compares with edgelesssys's port of Microsoft's client:
// it packs the same statements to the same request, but for the system's name, and
// decrypts a token that was encrypted to our key with the one that it makes itself.
func TestTheRequestIsTheLibrarys(t *testing.T) {
	w := newWorld(t)
	nonce := bytes.Repeat([]byte{5}, 32)
	host := w.provider.Machine.SNP
	chip := func(certs ...*x509.Certificate) (out []byte) {
		for _, c := range certs {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
		}
		return out
	}
	c := &client{opts: w.opts}
	report := must[*azure.Report](t)(c.report())
	ak := must[[]byte](t)(c.readNV(nvAKCertificate, ""))
	vtpm := must[transport.TPMCloser](t)(tpm.OpenDevice(w.opts.Device))
	s := must[*quoted](t)(state(vtpm, nonce))
	key := must[*transportKey](t)(newTransportKey(vtpm, s))
	body := must[[]byte](t)(request{nonce: nonce, report: report, chip: chip(host.VCEK, host.ASK, host.ARK), ak: ak,
		log: must[[]byte](t)(readLog(bootLog)), state: s, key: key}.marshal())

	values := map[uint32][]byte{}
	for i, v := range s.values {
		values[uint32(i)] = v
	}
	theirs := &captured{}
	_, err := library.GetEncryptedToken(t.Context(), library.Parameters{
		SNPReport: report.Hardware, RuntimeData: report.RuntimeData, VcekCert: chip(host.VCEK), VcekChain: chip(host.ASK, host.ARK),
		EncKey: key.public, EncKeyCertInfo: key.attest, EncKeyCertInfoSig: key.signature,
		Attestation: &attest.Attestation{AkPub: s.public[2:], AkCert: ak, EventLog: must[[]byte](t)(os.ReadFile(bootLog)), Quotes: []*pb.Quote{{
			Quote: s.attest, RawSig: append([]byte{0, 0x14, 0, 0x0b, 1, 0}, s.signature...), Pcrs: &pb.PCRs{Hash: pb.HashAlgo_SHA256, Pcrs: values},
		}}},
	}, nonce, w.opts.URL, theirs)
	if err == nil || theirs.body == nil {
		t.Fatalf("the library sent %d bytes: %v", len(theirs.body), err)
	}
	got, want := attestationInfo(t, body), attestationInfo(t, theirs.body)
	for _, system := range []string{"OSBuild", "OSDistro", "OSType"} {
		if reflect.TypeOf(got[system]) != reflect.TypeOf(want[system]) || got[system] == "" {
			t.Errorf("%s is %v, the library's %v", system, got[system], want[system])
		}
		delete(got, system)
		delete(want, system)
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("the request is\n%v\nthe library's\n%v", got, want)
	}

	rsp := must[*http.Response](t)(w.opts.Client.Post(w.opts.URL+"/attest/AzureGuest?api-version=2020-10-01", "application/json", bytes.NewReader(body)))
	defer rsp.Body.Close()
	var sealed struct{ Token string }
	if err := json.NewDecoder(rsp.Body).Decode(&sealed); err != nil {
		t.Fatal(err)
	}
	key.flush()
	if err := vtpm.Close(); err != nil {
		t.Fatal(err)
	}
	if token := must[string](t)(library.DecryptToken(sealed.Token, w.tpm.Dial(t))); strings.Count(token, ".") != 2 {
		t.Errorf("the library reads the token %q", token)
	}
}

func TestWhatAProviderOrAHostAnswersIsChecked(t *testing.T) {
	w := newWorld(t)
	flip := func(name string) func(*world) {
		return func(w *world) {
			w.provider.Answer = func(a map[string]any) { a[name].([]byte)[0] ^= 1 }
		}
	}
	set := func(name string, value any) func(*world) {
		return func(w *world) { w.provider.Answer = func(a map[string]any) { a[name] = value } }
	}
	host := func(body string, status int) func(*world) {
		return func(w *world) {
			w.imds.Fault = func(rw http.ResponseWriter, _ *http.Request) bool {
				rw.WriteHeader(status)
				_, _ = rw.Write([]byte(body))
				return true
			}
		}
	}
	for name, c := range map[string]struct {
		change func(*world)
		want   string
	}{
		"another token":             {flip("Jwt"), "message authentication failed"},
		"another tag":               {flip("AuthenticationData"), "message authentication failed"},
		"a short tag":               {set("AuthenticationData", make([]byte, 4)), "tag of 4"},
		"a nonce of another length": {set("EncryptionParams", map[string]any{"Iv": make([]byte, 16)}), "nonce of 16"},
		"no nonce":                  {set("EncryptionParams", nil), "nonce of 0"},
		"a key of another length":   {set("EncryptedInnerKey", make([]byte, 255)), "key of 255 bytes"},
		"a key for nobody":          {set("EncryptedInnerKey", make([]byte, 256)), "key of the token"},
		"no text":                   {set("Jwt", []byte{}), "text of 0"},
		"a host without knowledge":  {host("gone", http.StatusGone), `410 Gone: "gone"`},
		"a host that says much":     {host(strings.Repeat("x", maxAnswer+1), http.StatusOK), "more than"},
		"a host's long refusal":     {host(strings.Repeat("x", 5000), http.StatusTeapot), strings.Repeat("x", maxExcerpt) + `"`},
		"a host without words":      {host("{}", http.StatusOK), "no certificate"},
	} {
		t.Run(name, func(t *testing.T) {
			w.provider.Answer, w.imds.Fault = nil, nil
			c.change(w)
			if token, err := w.token(t, make([]byte, 32)); err == nil || token != "" || !strings.Contains(err.Error(), c.want) {
				t.Errorf("token %q, error %v", token, err)
			}
		})
	}
}

func TestAMachineThatCannotBeAttestedSaysWhy(t *testing.T) {
	w := newWorld(t)
	good := w.opts
	w.opts.EventLog = filepath.Join(t.TempDir(), "none")
	if _, err := w.token(t, make([]byte, 32)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("without an event log: %v", err)
	}
	w.opts = good
	bare := swtpm.New(t, nil)
	w.opts.Device = bare.Device
	if _, err := w.token(t, make([]byte, 32)); !errors.Is(err, attestation.ErrNoDevice) {
		t.Errorf("on another machine: %v", err)
	}
	if err := w.provider.Machine.Provision(bare.Device, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := w.token(t, make([]byte, 32)); !errors.Is(err, attestation.ErrNoDevice) || !strings.Contains(err.Error(), "certificate of the attestation key") {
		t.Errorf("without a certificate: %v", err)
	}
	td := &azurehcl.Machine{ID: "x", Fields: intel.DefaultFields(), TDX: &intel.Machine{}}
	other := swtpm.New(t, nil)
	if err := td.Provision(other.Device, nil); err != nil {
		t.Fatal(err)
	}
	w.opts.Device = other.Device
	if _, err := w.token(t, make([]byte, 32)); !errors.Is(err, ErrHardware) {
		t.Errorf("on a TD: %v", err)
	}
}

// The key for the token is gone when there is a token, or none.
func TestNoKeyStaysInTheTPM(t *testing.T) {
	w := newWorld(t)
	for range 5 { // a TPM holds three
		if _, err := w.token(t, make([]byte, 32)); err != nil {
			t.Fatal(err)
		}
		w.provider.Answer = func(a map[string]any) { a["Jwt"] = []byte("x") }
		if _, err := w.token(t, make([]byte, 32)); err == nil {
			t.Fatal("a token of nothing")
		}
		w.provider.Answer = nil
	}
}

// The log that the provider gets has the events of PCRs 0 to 7, and replays to the same
// values.
func TestAStrippedLogReplaysToTheSame(t *testing.T) {
	log := must[[]byte](t)(os.ReadFile(bootLog))
	stripped := must[[]byte](t)(stripLog(log))
	before := must[*tpm.EventLog](t)(tpm.ParseEventLog(log))
	after := must[*tpm.EventLog](t)(tpm.ParseEventLog(stripped))
	for pcr := range uint32(16) {
		want, wantEvents, err1 := before.Replay(pcr)
		got, gotEvents, err2 := after.Replay(pcr)
		if err := errors.Join(err1, err2); err != nil {
			t.Fatal(err)
		}
		switch {
		case pcr < registers && (!reflect.DeepEqual(got, want) || len(gotEvents) != len(wantEvents) || len(gotEvents) == 0):
			t.Errorf("PCR %d: %d events to %x, before %d to %x", pcr, len(gotEvents), got, len(wantEvents), want)
		case pcr >= registers && len(gotEvents) != 0:
			t.Errorf("PCR %d has %d events", pcr, len(gotEvents))
		}
	}
}
