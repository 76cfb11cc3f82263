package framed

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/storage"
)

func TestAFramedObjectComesBackWithItsToken(t *testing.T) {
	for _, data := range []string{"", "x", "\n", strings.Repeat("\n\x00", storage.MaxObject/2)} {
		body, token := Frame([]byte(data))
		got, gotToken, err := Read(bytes.NewReader(body))
		if err != nil || string(got) != data || gotToken != token {
			t.Errorf("%.10q: %.10q, %q, %v", data, got, gotToken, err)
		}
		if again, other := Frame([]byte(data)); other == token || bytes.Equal(again, body) {
			t.Error("two writes of one content look the same")
		}
	}
	if _, _, err := Read(bytes.NewReader(make([]byte, storage.MaxObject+maxFrame+1))); !errors.Is(err, storage.ErrTooLarge) {
		t.Error(err)
	}
}

// FuzzUnframe: only what Frame makes is taken, and any change is noticed.
func FuzzUnframe(f *testing.F) {
	body, _ := Frame([]byte("data"))
	f.Add(body, 0, byte(1))
	f.Add([]byte("keyagent object 1 T S\n"), 3, byte(0))
	f.Fuzz(func(t *testing.T, body []byte, at int, by byte) {
		if data, token, err := Unframe(body); err != nil {
			if !errors.Is(err, storage.ErrCorrupt) || data != nil || token != "" {
				t.Fatal(err)
			}
		} else if !bytes.HasSuffix(body, data) || token == "" {
			t.Fatalf("%q gave %q", body, data)
		}
		whole, token := Frame(body[:min(len(body), storage.MaxObject)])
		if at < 0 || by == 0 {
			return
		}
		at %= len(whole)
		whole[at] ^= by
		if _, got, err := Unframe(whole); err == nil && got == token {
			t.Fatalf("a change of byte %d was not noticed", at)
		}
	})
}

func TestAVersionIsSplitIntoWhatItWasMadeOf(t *testing.T) {
	if token, compared, ok := SplitVersion(JoinVersion("T", `"e t"`)); !ok || token != "T" || compared != `"e t"` {
		t.Errorf("%q, %q, %v", token, compared, ok)
	}
	for _, v := range []storage.Version{storage.Absent, "x", " x", "x "} {
		if _, _, ok := SplitVersion(v); ok {
			t.Errorf("%q was split", v)
		}
	}
	body, token := Frame(nil)
	if !bytes.HasPrefix(body, []byte(Start(token))) {
		t.Errorf("%q does not begin with %q", body, Start(token))
	}
}
