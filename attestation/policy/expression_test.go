package policy

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/attestation"
)

// A machine that brings evidence which its profile does not demand says nothing with it.
func TestAnExpressionSeesWhatTheProfileDemands(t *testing.T) {
	for name, when := range map[string]string{
		"identity": `!(identity in ["chip"])`, "trust": `trust == "enrolled:rack-7"`, "kinds": `"tpm" in kinds`,
		"facts": `"ek" in tpm`, "identity of the kind": `snp.identity != "chip"`, "trust of the kind": `"trust" in tpm`,
	} {
		p := parse(t, strings.Replace(plain(hardware), "operations: [open]}", `operations: [open], when: '`+when+`'}`, 1))
		more := attestation.Claims{Kind: attestation.TPM, Identity: "another", Trust: "enrolled:rack-7", Facts: map[string]any{"ek": "another"}}
		for _, all := range [][]attestation.Claims{{snpClaims()}, {snpClaims(), more}, {more, snpClaims()}} {
			a, err := p.Appraise(verified(t, all...))
			if err != nil || a.Profile != "snp" {
				t.Fatalf("%+v, %v", a, err)
			}
			if _, err := p.Authorize(a, Request{Volume: "v", Operation: Open, Now: time.Unix(0, 0)}); !errors.Is(err, ErrDenied) {
				t.Errorf("%s, with %d claims: %v", name, len(all), err)
			}
		}
	}
}

// Expressions see the facts of every kind.
func TestExpressionsSeeHardware(t *testing.T) {
	text := strings.Replace(plain(hardware), "operations: [open]}", `operations: [open], when: 'kinds == ["snp"] && snp.tcb_reported_snp >= uint(8) && !("vm_id" in azure) && trust == "root:amd"'}`, 1)
	p := parse(t, text)
	a, err := p.Appraise(verified(t, snpClaims()))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.Authorize(a, Request{Volume: "v", Operation: Open, Now: time.Unix(0, 0)}); err != nil {
		t.Error(err)
	}
	a, err = p.Appraise(verified(t, azureClaims()...))
	if err != nil {
		t.Fatal(err)
	}
	_, err = p.Authorize(a, Request{Volume: "v", Operation: Open, Now: time.Unix(0, 0)})
	wantErr(t, err, ErrDenied)
}
