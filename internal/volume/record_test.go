package volume

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"strings"
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

var testMAC = bytes.Repeat([]byte{7}, 32)

func activeRecord() *Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)
	return &Record{
		VolumeID: "data-1", State: Active, Revision: 2, Generation: 1, Owner: "data",
		LUKSUUID: "7f0c6a57-0b4f-4a55-8b4e-0d5b6f2f3b11", KeyVersion: 1,
		Keys:      []WrappedDEK{{1, 32, "", kms.Wrapped{Scheme: "hkdf-sha256", KEK: "cluster"}}},
		HeaderMAC: hex.EncodeToString(testMAC), Created: at, Updated: at,
	}
}

// Anyone who has the MAC key still writes only what means something.
func TestARecordIsReadStrictly(t *testing.T) {
	good, err := json.Marshal(activeRecord())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Parse("data-1", good); err != nil {
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
		"another volume's":         replace(`"data-1"`, `"data-2"`),
		"one copy's MAC":           replace(`,"created"`, `,"copy_macs":["`+hex.EncodeToString(testMAC)+`"],"created"`),
		"a copy's MAC of zeros":    replace(`,"created"`, `,"copy_macs":["`+strings.Repeat("00", 32)+`","`+hex.EncodeToString(testMAC)+`"],"created"`),
		"active with an attempt":   replace(`,"created"`, `,"attempt":{"id":"`+strings.Repeat("aa", 16)+`","holder":"x","channel":"`+strings.Repeat("bb", 32)+`"},"created"`),
		"a lease without an ID":    replace(`,"created"`, `,"lease":{"id":"","holder":"x","since":"2026-01-02T03:04:05Z","until":"2026-01-02T03:06:05Z","term_ms":120000},"created"`),
		"a lease that ends first":  replace(`,"created"`, `,"lease":{"id":"`+strings.Repeat("aa", 16)+`","holder":"x","since":"2026-01-02T03:04:05Z","until":"2026-01-02T03:04:04Z","term_ms":120000},"created"`),
		"an empty attempt":         replace(`,"created"`, `,"attempt":{},"created"`),
		"a time that is not UTC's": replace(`"created":"2026-01-02T03:04:05.000000006Z"`, `"created":"2026-01-02T03:04:05.000000006+00:00"`),
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("data-1", body)
			wantErr(t, err, ErrRecord)
		})
	}
}

// states has a record of each state, with all that it may have.
func states() map[State]*Record {
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	until := at.Add(AttemptTerm)
	mac := hex.EncodeToString(testMAC)
	holder := Holder{Machine: "tpm:aa", Name: "tpm:aa", Node: "node-1"}
	attempt := &Attempt{ID: strings.Repeat("aa", 16), Holder: holder, Channel: strings.Repeat("bb", 32)}
	writes := *attempt
	writes.HeaderMAC, writes.CopyMACs, writes.Until = mac, []string{mac, mac}, &until
	lease := &Lease{ID: strings.Repeat("cc", 16), Holder: holder, Since: at, Until: until, TermMS: 120_000, Bound: true}
	all := map[State]*Record{}
	for _, s := range States() {
		r := activeRecord()
		r.State, r.CopyMACs = s, []string{mac, mac}
		switch s {
		case Pending:
			r.HeaderMAC, r.CopyMACs, r.Attempt = "", nil, &writes
		case Formatted:
			r.Attempt, r.Lease = attempt, lease
		case Active:
			r.Lease = lease
		case Rotating:
			next := r.Keys[0]
			next.Version = 2
			r.Keys, r.LastVersion = append(r.Keys, next), 2
			r.Rotation = &Rotation{KeyVersion: 2, HeaderMAC: mac, CopyMACs: []string{mac, mac}, Stands: true}
			r.Lease, r.Rotate = lease, &Wish{Due: at, EveryS: 86400}
		case Retired:
			r.Keys = []WrappedDEK{}
		}
		all[s] = r
	}
	return all
}

// The vectors of docs/spec/volume-record.md: what an older key service wrote parses
// and stays as it was, byte for byte.
func TestRecordsOfTheVersionBeforeStayAsTheyAre(t *testing.T) {
	for _, body := range []string{
		`{"volume_id":"data-1","state":"active","revision":2,"generation":1,"owner":"guest-data","luks_uuid":"11111111-2222-3333-4444-555555555555","key_version":1,"keys":[{"version":1,"length":32,"wrapped":{"scheme":"hkdf-sha256","kek":"cluster:0001020304050607"}}],"header_mac":"0707070707070707070707070707070707070707070707070707070707070707","created":"2026-01-02T03:04:05Z","updated":"2026-01-02T03:04:06Z"}`,
		`{"volume_id":"data-1","state":"pending","revision":1,"generation":1,"owner":"guest-data","luks_uuid":"11111111-2222-3333-4444-555555555555","key_version":1,"keys":[{"version":1,"length":32,"wrapped":{"scheme":"aes-256-gcm","kek":"vault","blob":"AAEC"}}],"created":"2026-01-02T03:04:05Z","updated":"2026-01-02T03:04:05Z"}`,
	} {
		r, err := Parse("data-1", []byte(body))
		if err != nil {
			t.Fatal(err)
		}
		if again, err := r.Encode(); err != nil || string(again) != body {
			t.Errorf("%s became %s, %v", body, again, err)
		}
	}
}

// A record of each state parses, and the row of its state says what is missing in it.
func TestEachStateHasWhatItsRowSays(t *testing.T) {
	for state, r := range states() {
		body, err := r.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := Parse("data-1", body); err != nil {
			t.Errorf("%s: %v", state, err)
		}
		for part, change := range map[string]struct {
			rule rule
			f    func(*Record)
		}{
			"key":      {life[state].key, func(r *Record) { r.Keys = []WrappedDEK{} }},
			"header":   {life[state].header, func(r *Record) { r.HeaderMAC, r.CopyMACs = "", nil }},
			"attempt":  {life[state].attempt, func(r *Record) { r.Attempt = nil }},
			"lease":    {life[state].lease, func(r *Record) { r.Lease = nil }},
			"rotation": {life[state].rotation, func(r *Record) { r.Rotation = nil }},
			"wish":     {life[state].wish, func(r *Record) { r.Rotate = nil }},
		} {
			without := *r
			change.f(&without)
			if err := without.check(); (err != nil) != (change.rule == must) {
				t.Errorf("%s without a %s: %v", state, part, err)
			}
		}
	}
	// The protocol knows each state that a key can be released in, by a name of its own. One
	// whose key is being changed is active for a node.
	names := map[string]State{}
	for _, s := range States() {
		if s == Rotating {
			continue
		}
		name := s.Proto().String()
		if other, ok := names[name]; ok {
			t.Errorf("%s and %s are both %s", s, other, name)
		}
		names[name] = s
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
	for _, r := range states() {
		text, err := json.Marshal(r)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, body []byte) {
		r, err := Parse("data-1", body)
		if err != nil {
			wantErr(t, err, ErrRecord)
			return
		}
		if again, err := json.Marshal(r); err != nil || !bytes.Equal(again, body) {
			t.Fatalf("%s became %s", body, again)
		}
		if b, _, err := r.Binding(); r.State != Retired && (err != nil || b.Validate() != nil || b.VolumeID != r.VolumeID) {
			t.Fatalf("no key can be had of %s: %v", body, err)
		}
	})
}
