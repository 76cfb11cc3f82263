package maa

import "testing"

func TestOnlyAnHTTPSAddressIsAskedForTokens(t *testing.T) {
	for _, address := range []string{"", "shared.example", "http://shared.example", "https://", "https://user@shared.example", "https://shared.example?x=1"} {
		if _, err := New(Options{URL: address}); err == nil {
			t.Errorf("%q is accepted", address)
		}
	}
	if _, err := New(Options{URL: "https://shared.example"}); err != nil {
		t.Error(err)
	}
}
