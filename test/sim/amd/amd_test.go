package amd_test

import (
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/test/sim/amd"
)

func TestAChipIsTheSameAfterItWasSaved(t *testing.T) {
	for _, product := range []string{"Milan", "Turin"} {
		a, err := amd.New(amd.Options{Product: product})
		if err != nil {
			t.Fatal(err)
		}
		chip, err := a.Chip(amd.ChipOptions{})
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(t.TempDir(), "chip.pem")
		if err := chip.Save(path); err != nil {
			t.Fatal(err)
		}
		loaded, err := amd.Load(path)
		if err != nil {
			t.Fatal(err)
		}
		v, err := snp.NewVerifier(snp.VerifierOptions{Trust: chip.Trust})
		if err != nil {
			t.Fatal(err)
		}
		ev, err := loaded.Evidence(amd.Report{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := v.VerifyReport(t.Context(), ev, [64]byte{}); err != nil {
			t.Errorf("%s: %v", product, err)
		}
	}
	if _, err := amd.Load(filepath.Join(t.TempDir(), "none")); err == nil {
		t.Error("a chip from nowhere")
	}
}

func TestTheServiceKnowsItsChipsOnly(t *testing.T) {
	a, err := amd.New(amd.Options{})
	if err != nil {
		t.Fatal(err)
	}
	chip, err := a.Chip(amd.ChipOptions{})
	if err != nil {
		t.Fatal(err)
	}
	kds := amd.NewKDS(chip)
	for path, want := range map[string]int{
		"/vcek/v1/Milan/cert_chain": 200, "/vlek/v1/Milan/cert_chain": 200, "/vcek/v1/Milan/crl": 200,
		"/vcek/v1/Genoa/crl": 404, "/vcek/v1/Milan/00?blSPL=1": 404, "/": 404, "/vcek/v1/Milan": 404,
	} {
		w := httptest.NewRecorder()
		kds.ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
		if w.Code != want {
			t.Errorf("%s: %d", path, w.Code)
		}
	}
}
