package dekrecord

import (
	"errors"
	"testing"

	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
)

// FuzzVisit: a body that is read is, byte for byte, what it would be stored as.
func FuzzVisit(f *testing.F) {
	b := kms.Binding{VolumeID: "a", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	good, err := New(b, kms.Wrapped{Scheme: "s", KEK: "k", Blob: []byte{0}})
	if err != nil {
		f.Fatal(err)
	}
	if r, err := Parse("a", good); err != nil || r.Binding() != b {
		f.Fatalf("%+v, %v", r, err)
	}
	f.Add(string(good))
	f.Add(`{"id":"a"}`)
	f.Add(`{"id":"b","version":1,"length":32,"wrapped":{"scheme":"s","kek":"k"}}`)
	f.Fuzz(func(t *testing.T, body string) {
		same := func(_ kms.Binding, w kms.Wrapped) (kms.Wrapped, error) { return w, nil }
		got, err := Visit("a", []byte(body), same)
		if err != nil {
			if !errors.Is(err, macstore.ErrRefused) {
				t.Fatal(err)
			}
			return
		}
		if string(got) != body {
			t.Fatalf("%s became %s", body, got)
		}
	})
}
