package keyservice

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
)

func wantErr(t testing.TB, err, want error) {
	t.Helper()
	if !errors.Is(err, want) {
		t.Errorf("got %v, want %v", err, want)
	}
}

func activeRecord() *Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	return &Record{
		VolumeID: "data-1", State: Active, Revision: 2, Generation: 1, Owner: "data",
		LUKSUUID: "7f0c6a57-0b4f-4a55-8b4e-0d5b6f2f3b11", KeyVersion: 1,
		Keys:      []WrappedDEK{{1, 32, kms.Wrapped{Scheme: "hkdf-sha256", KEK: "cluster"}}},
		HeaderMAC: hex.EncodeToString(testMAC), Created: at, Updated: at,
	}
}

// Whoever has the MAC key still writes only what means something.
func TestARecordIsReadStrictly(t *testing.T) {
	good, err := json.Marshal(activeRecord())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := parseRecord(good); err != nil {
		t.Fatal(err)
	}
	replace := func(old, new string) []byte {
		if !bytes.Contains(good, []byte(old)) {
			t.Fatalf("%s is not in %s", old, good)
		}
		return bytes.Replace(good, []byte(old), []byte(new), 1)
	}
	for name, body := range map[string][]byte{
		"a blank":                  append([]byte(" "), good...),
		"an unknown field":         replace(`{"volume_id"`, `{"more":1,"volume_id"`),
		"a field twice":            replace(`{"volume_id"`, `{"volume_id":"x","volume_id"`),
		"a field in capitals":      replace(`"owner"`, `"OWNER"`),
		"another order":            replace(`"revision":2,"generation":1`, `"generation":1,"revision":2`),
		"a number as text":         replace(`"revision":2`, `"revision":"2"`),
		"a number with a point":    replace(`"revision":2`, `"revision":2.0`),
		"something behind it":      append(bytes.Clone(good), "{}"...),
		"an escape":                replace(`"data-1"`, `"d\u0061ta-1"`),
		"a volume that is none":    replace(`"data-1"`, `"../data"`),
		"an unknown state":         replace(`"active"`, `"absent"`),
		"no state":                 replace(`"active"`, `""`),
		"revision 0":               replace(`"revision":2`, `"revision":0`),
		"generation 0":             replace(`"generation":1`, `"generation":0`),
		"no owner":                 replace(`"owner":"data"`, `"owner":""`),
		"no UUID":                  replace(`7f0c6a57-0b4f-4a55-8b4e-0d5b6f2f3b11`, ``),
		"no header MAC":            replace(`,"header_mac":"`+hex.EncodeToString(testMAC)+`"`, ``),
		"a short header MAC":       replace(hex.EncodeToString(testMAC), hex.EncodeToString(testMAC[1:])),
		"a key that is not there":  replace(`"key_version":1`, `"key_version":2`),
		"key version 0":            replace(`"key_version":1,"keys":[{"version":1`, `"key_version":0,"keys":[{"version":0`),
		"a key of 15 bytes":        replace(`"length":32`, `"length":15`),
		"a key of 65 bytes":        replace(`"length":32`, `"length":65`),
		"a key of 4 GiB":           replace(`"length":32`, `"length":4294967295`),
		"null":                     []byte("null"),
		"nothing":                  nil,
		"another type":             []byte("[]"),
		"a time that is not UTC's": replace(`"created":"2026-01-02T03:04:05.000000006Z"`, `"created":"2026-01-02T03:04:05.000000006+00:00"`),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseRecord(body)
			wantErr(t, err, ErrRecord)
		})
	}
}

// The life of a volume is a table; this is the whole of it.
func TestAVolumeLivesInOneDirection(t *testing.T) {
	all := []State{"", Pending, Active, Retired, "formatted"}
	allowed := map[[2]State]bool{{"", Pending}: true, {Pending, Active}: true, {Pending, Retired}: true, {Active, Retired}: true}
	for _, from := range all {
		for _, to := range all {
			r := &Record{State: from, Revision: 7}
			err := r.to(to, time.Unix(1, 0))
			if allowed[[2]State{from, to}] {
				if err != nil || r.State != to || r.Revision != 8 || r.Updated.IsZero() {
					t.Errorf("from %q to %q: %+v, %v", from, to, r, err)
				}
				continue
			}
			wantErr(t, err, ErrTransition)
			if r.State != from || r.Revision != 7 {
				t.Errorf("from %q to %q: the record changed to %+v", from, to, r)
			}
		}
	}
}

// FuzzRecord: a record that parses is, byte for byte, what it would be stored
// as.
func FuzzRecord(f *testing.F) {
	active, err := json.Marshal(activeRecord())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(active)
	pending := activeRecord()
	pending.State, pending.HeaderMAC = Pending, ""
	text, err := json.Marshal(pending)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(text)
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := parseRecord(body)
		if err != nil {
			wantErr(t, err, ErrRecord)
			return
		}
		if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, body) {
			t.Fatalf("%s became %s", body, again)
		}
		if b, _, err := r.binding(); err != nil || b.Validate() != nil || b.VolumeID != r.VolumeID {
			t.Fatalf("no key can be had of %s: %v", body, err)
		}
	})
}
