package attestation

import (
	"errors"
	"testing"
	"time"
)

func TestNothingVerifiedIsRefused(t *testing.T) {
	if v, err := NewVerified(Binder{}, time.Now()); !errors.Is(err, ErrRefused) || v != nil {
		t.Errorf("%v, %v", v, err)
	}
	v := &Verified{}
	if _, ok := v.Claims(TPM); ok || len(v.All()) != 0 || v.Identity() != "" {
		t.Errorf("the zero value claims %+v", v.All())
	}
}

func TestVerifiedNamesEveryPart(t *testing.T) {
	at := time.Unix(7, 0)
	v, err := NewVerified(Binder{1}, at, Claims{Kind: TPM, Identity: "aa"}, Claims{Kind: "other", Identity: "bb"})
	if err != nil || v.Identity() != "tpm:aa+other:bb" || v.Binder() != (Binder{1}) || !v.At().Equal(at) {
		t.Fatalf("%+v, %v", v, err)
	}
	if c, ok := v.Claims("other"); !ok || c.Identity != "bb" {
		t.Errorf("%+v", c)
	}
	if _, ok := v.Claims("third"); ok {
		t.Error("claims of a kind that is not there")
	}
}
