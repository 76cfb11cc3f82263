package intel

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-configfs-tsm/report"
	"github.com/google/go-tdx-guest/abi"
)

func machine(t *testing.T) *Machine {
	t.Helper()
	w, err := New(time.Now())
	if err != nil {
		t.Fatal(err)
	}
	m, err := w.Machine(DefaultPlatform())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestAMachineIsTheSameAfterAFile(t *testing.T) {
	m := machine(t)
	path := filepath.Join(t.TempDir(), "machine.json")
	if err := m.Save(path); err != nil {
		t.Fatal(err)
	}
	again, err := Load(path)
	if err != nil {
		t.Fatal(err)
	}
	a, b := m.Chain(), again.Chain()
	if !bytes.Equal(a, b) || !again.PCK.Key.Equal(m.PCK.Key) || again.QE.SVN != m.QE.SVN || !again.World.Now.Equal(m.World.Now) {
		t.Error("another machine")
	}
	if _, err := again.Quote(DefaultFields()); err != nil {
		t.Error(err)
	}
}

// TestTheKernelsInterface: the library reads our quotes through our configfs.
func TestTheKernelsInterface(t *testing.T) {
	m := machine(t)
	data := [64]byte{7}
	r, err := report.Get(m.TSM(DefaultFields()), &report.Request{InBlob: data[:]})
	if err != nil || r.Provider != "tdx_guest\n" || len(r.OutBlob) != bufferSize {
		t.Fatalf("%v, %+v", err, r)
	}
	q, err := abi.QuoteToProto(r.OutBlob)
	if err != nil || q == nil {
		t.Error(err)
	}
}

func TestTheServiceAnswersAsIntels(t *testing.T) {
	m := machine(t)
	pcs := &PCS{World: m.World}
	srv := httptest.NewServer(pcs)
	defer srv.Close()
	for path, header := range map[string]string{
		"/tdx/certification/v4/tcb?fmspc=50806f000000":           "TCB-Info-Issuer-Chain",
		"/tdx/certification/v4/qe/identity":                      "SGX-Enclave-Identity-Issuer-Chain",
		"/sgx/certification/v4/pckcrl?ca=processor&encoding=der": "SGX-PCK-CRL-Issuer-Chain",
		"/IntelSGXRootCA.der":                                    "",
	} {
		rsp, err := http.Get(srv.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(rsp.Body)
		rsp.Body.Close()
		if rsp.StatusCode != http.StatusOK || len(body) == 0 {
			t.Errorf("%s: %s", path, rsp.Status)
		}
		if header != "" {
			chain, err := url.PathUnescape(rsp.Header.Get(header))
			other, err2 := url.QueryUnescape(rsp.Header.Get(header))
			if err != nil || err2 != nil || chain != other || !bytes.HasSuffix([]byte(chain), PEM(m.World.Root.Certificate)) {
				t.Errorf("%s: chain %q", path, chain)
			}
		}
	}
	pcs.Fault = func(w http.ResponseWriter, _ *http.Request) bool {
		w.WriteHeader(http.StatusTooManyRequests)
		return true
	}
	rsp, err := http.Get(srv.URL + "/IntelSGXRootCA.der")
	if err != nil || rsp.StatusCode != http.StatusTooManyRequests || len(pcs.Requests()) != 4 {
		t.Errorf("%v, %v", rsp, err)
	}
	rsp.Body.Close()
}
