package tdx

import (
	"bytes"
	"crypto/x509"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tdx-guest/pcs"
	testcases "github.com/google/go-tdx-guest/testing"
	"github.com/google/go-tdx-guest/testing/testdata"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/endorsement"
)

// The real evidence is what go-tdx-guest ships (Apache-2.0): a quote of a Sapphire
// Rapids machine with Intel's answers of June 2023, and a quote of Google's cos-113
// with its event log.

// recordedAt lies within the dates of everything that was recorded.
var recordedAt = time.Date(2023, 7, 1, 1, 0, 0, 0, time.UTC)

// realQuote cuts off what the library's file has behind the quote.
func realQuote(t testing.TB) []byte {
	t.Helper()
	size := 636 + int(binary.LittleEndian.Uint32(testdata.RawQuote[632:]))
	if rest := testdata.RawQuote[size:]; !strings.Contains(string(rest), "only for testing purpose") {
		t.Fatalf("%q", rest)
	}
	return bytes.Clone(testdata.RawQuote[:size])
}

// moduleFile reads a file of go-tdx-guest that its packages do not export.
func moduleFile(t testing.TB, path string) []byte {
	t.Helper()
	dir, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/google/go-tdx-guest").Output()
	if err != nil {
		t.Fatal(err)
	}
	return must[[]byte](t)(os.ReadFile(filepath.Join(strings.TrimSpace(string(dir)), path)))
}

// recorded answers what Intel answered in 2023.
func recorded(t testing.TB) *attestv1.TDXCollateral {
	t.Helper()
	chain := func(header map[string][]string) []byte {
		for _, v := range header {
			return []byte(must[string](t)(url.QueryUnescape(v[0])))
		}
		return nil
	}
	return must[*attestv1.TDXCollateral](t)(collateralOf([]endorsement.Document{
		{Body: testdata.TcbInfoBody, Chain: chain(testcases.TcbInfoHeader)},
		{Body: testdata.QeIdentityBody, Chain: chain(testcases.QeIdentityHeader)},
		{Body: testdata.PckCrlBody, Chain: chain(testcases.PckCrlHeader)},
		{Body: testdata.RootCrlBody},
	}))
}

// signaturesOf verifies everything of a quote that needs no collateral.
func signaturesOf(t testing.TB, quote []byte, at time.Time) (*Quote, *pck) {
	t.Helper()
	v := must[*Verifier](t)(NewVerifier(VerifierOptions{Trust: func() Trust { return Trust{Roots: []Root{Intel()}} }}))
	q := must[*Quote](t)(Parse(quote))
	_, p, err := v.vouch([]Root{Intel()}, q, at)
	if err != nil {
		t.Fatal(err)
	}
	key, err := v.attestationKey(p, q)
	if err != nil {
		t.Fatal(err)
	}
	if !verifyRaw(key, q.signed, q.signature) {
		t.Fatal(ErrSignature)
	}
	return q, p
}

func TestARealQuoteChainsToIntel(t *testing.T) {
	q, p := signaturesOf(t, realQuote(t), recordedAt)
	if p.FMSPC != "50806f000000" || p.ca != "platform" || p.piid == "" || len(p.configuration) != 3 || q.Claims().Facts["debug"] != false {
		t.Errorf("%+v, %+v", p.PckExtensions, p.configuration)
	}
	v := must[*Verifier](t)(NewVerifier(VerifierOptions{Trust: func() Trust { return Trust{Roots: []Root{Intel()}} }}))
	if _, _, err := v.vouch([]Root{Intel()}, q, recordedAt.AddDate(10, 0, 0)); !errors.Is(err, ErrExpired) {
		t.Error(err)
	}
	// With the test's words behind it, it is no quote.
	if _, err := Parse(testdata.RawQuote); !errors.Is(err, ErrMalformed) {
		t.Error(err)
	}
}

func TestIntelsRecordedCollateralVerifies(t *testing.T) {
	_, p := signaturesOf(t, realQuote(t), recordedAt)
	memory := &endorsement.Memory{}
	e, err := verifyCollateral(memory, Intel().Certificate, p, documents(recorded(t)), recordedAt)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.checkRevoked(memory, Intel().Certificate, p); err != nil {
		t.Error(err)
	}
	// The documents with the shortest time are the QE identity and the PCK CRL.
	if want := time.Date(2023, 7, 8, 7, 24, 59, 0, time.UTC); !e.valid.to.Equal(want) {
		t.Errorf("valid until %s, not %s", e.valid.to, want)
	}
	crl, err := x509.ParseRevocationList(testdata.PckCrlBody)
	if err != nil || len(crl.RevokedCertificateEntries) == 0 {
		t.Fatal(err)
	}
	for _, entry := range crl.RevokedCertificateEntries {
		if since, ok := memory.Revoked(p.issuer, entry.SerialNumber); !ok || !since.Equal(entry.RevocationTime) {
			t.Errorf("%x is not known as revoked", entry.SerialNumber)
		}
	}
}

// TestTheRecordedPlatformHasNoLevel: the library says "no matching TCB level" of
// its quote and its collateral. So do we, and it is right: both levels ask for
// newer microcode and SEAM loader than the machine had. With exactly these numbers
// lowered it is up to date, so that nothing else stands in the way.
func TestTheRecordedPlatformHasNoLevel(t *testing.T) {
	ev := &attestv1.TDXEvidence{Quote: realQuote(t), Collateral: recorded(t)}
	v := must[*Verifier](t)(NewVerifier(VerifierOptions{
		Trust: func() Trust { return Trust{Roots: []Root{Intel()}} }, Now: func() time.Time { return recordedAt },
	}))
	q, p := signaturesOf(t, ev.Quote, recordedAt)
	if _, err := v.VerifyQuote(t.Context(), ev, q.ReportData); !errors.Is(err, ErrTCB) {
		t.Fatal(err)
	}
	var info pcs.TdxTcbInfo
	if err := json.Unmarshal(testdata.TcbInfoBody, &info); err != nil {
		t.Fatal(err)
	}
	levels := info.TcbInfo.TcbLevels
	if len(levels) != 2 || q.body.teeTCBSVN[2] != 4 {
		t.Fatalf("%d levels, the quote has %x", len(levels), q.body.teeTCBSVN)
	}
	for _, l := range levels {
		var short []string
		lower := func(what string, need []pcs.TcbComponent, have []byte) {
			for i := range need {
				if have[i] < need[i].Svn {
					short = append(short, fmt.Sprintf("%s %d: %d of %d", what, i, have[i], need[i].Svn))
					need[i].Svn = have[i]
				}
			}
		}
		lower("sgx", l.Tcb.SgxTcbcomponents, p.TCB.CPUSvnComponents)
		lower("tdx", l.Tcb.TdxTcbcomponents, q.body.teeTCBSVN)
		if want := []string{"sgx 0: 3 of 5", "sgx 1: 3 of 5", "sgx 4: 2 of 3", "sgx 7: 2 of 3", "tdx 2: 4 of 5"}; !slices.Equal(short, want) {
			t.Errorf("the machine falls short in %q, not in %q", short, want)
		}
	}
	if l, err := platformLevel(&info.TcbInfo, p, q.body.teeTCBSVN); err != nil || l.TcbStatus != "UpToDate" {
		t.Errorf("%+v: %v", l, err)
	}
}

// TestARealEventLogReplays: cos-113 on Google Cloud, a TDX module 1.5.
func TestARealEventLogReplays(t *testing.T) {
	quote, area := moduleFile(t, "testing/testdata/ccel/cos-113-tdx-quote.dat"), moduleFile(t, "testing/testdata/ccel/ccel_data.dat")
	q, p := signaturesOf(t, quote, time.Date(2024, 9, 1, 0, 0, 0, 0, time.UTC))
	if q.ReportData != [64]byte{} || q.body.teeTCBSVN[1] != 1 || p.ca != "platform" {
		t.Errorf("%x %x", q.ReportData, q.body.teeTCBSVN)
	}
	log := trimEventLog(area)
	if len(area) != 262144 || len(log) != 18101 {
		t.Errorf("%d of %d bytes", len(log), len(area))
	}
	all, err := explain(q, log)
	if err != nil {
		t.Fatal(err)
	}
	for name, count := range map[string]int{"mrtd": 0, "rtmr0": 16, "rtmr1": 7, "rtmr2": 20, "rtmr3": 0} {
		if got := len(all[name].Events); got != count {
			t.Errorf("%s has %d events, not %d", name, got, count)
		}
	}
	if e := all["rtmr0"].Events[2]; e.Type != "EV_EFI_VARIABLE_DRIVER_CONFIG" && e.Name == "" {
		t.Errorf("%+v", e)
	}
	// With its padding it says the same.
	if _, err := explain(q, area); err != nil {
		t.Error(err)
	}
	// Another machine's log leads elsewhere.
	other, _ := signaturesOf(t, realQuote(t), recordedAt)
	all, err = explain(other, log)
	if err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		if m := all[register(n)]; len(m.Events) > 0 || !strings.Contains(m.Unexplained, "replay to") || !bytes.Equal(m.Value, other.body.rtmr[n]) {
			t.Errorf("rtmr%d: %+v", n, m)
		}
	}
}
