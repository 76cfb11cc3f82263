package volume

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
)

// rotatable is an active record with a lease, and its holder.
func rotatable() (*Record, *Caller) {
	r := states()[Active]
	r.CopyMACs = []string{strings.Repeat("11", 32), strings.Repeat("12", 32)}
	c := caller("node-1", "tpm:aa")
	c.Presents = r.Lease.ID
	return r, c
}

func nextKey(r *Record) WrappedDEK {
	b := r.NextKey()
	return WrappedDEK{Version: b.Version, Length: b.Length, Wrapped: kms.Wrapped{Scheme: "x", KEK: "y"}}
}

func mac(b byte) []byte { return bytes.Repeat([]byte{b}, 32) }

func nextHeader(r *Record, b byte) Header {
	return Header{Generation: r.Generation, KeyVersion: r.Rotation.KeyVersion, MAC: mac(b), CopyMACs: [][]byte{mac(b + 1), mac(b + 2)}}
}

func TestAKeyIsChangedInOrder(t *testing.T) {
	now := newClock().now()
	r, c := rotatable()
	other := caller("node-2", "tpm:bb")
	if _, err := r.Next(); !errors.Is(err, ErrRotation) {
		t.Fatalf("no rotation: %v", err)
	}
	wantErr(t, r.NextHeader(c, Header{}), ErrRotation)
	wantErr(t, r.NextStands(c, mac(9)), ErrRotation)
	wantErr(t, r.Rotated(c, 2, mac(9), now), ErrRotation)
	stale := nextKey(r)
	stale.Version = 7
	wantErr(t, r.BeginRotation(stale), ErrRotation)
	first := nextKey(r)
	check(t, r.BeginRotation(first))
	check(t, r.BeginRotation(WrappedDEK{})) // it has one already
	check(t, r.check())
	n, err := r.Next()
	check(t, err)
	if b, _, err := n.Binding(); err != nil || b.Version != 2 || r.KeyVersion != 1 || n.HeaderMAC != "" {
		t.Fatalf("next is %+v, %v", b, err)
	}
	wantErr(t, r.NextHeader(other, nextHeader(r, 20)), ErrLease)
	wrong := nextHeader(r, 20)
	wrong.KeyVersion = 1
	wantErr(t, r.NextHeader(c, wrong), ErrConfirm)
	wrong = nextHeader(r, 20)
	wrong.MAC = make([]byte, 32)
	wantErr(t, r.NextHeader(c, wrong), ErrConfirm)
	wantErr(t, r.NextStands(c, nil), ErrRotation)
	check(t, r.NextHeader(c, nextHeader(r, 20)))
	check(t, r.NextHeader(c, nextHeader(r, 30))) // nothing stands yet
	check(t, r.check())
	wantErr(t, r.Rotated(c, 2, mac(30), now), ErrRotation)
	wantErr(t, r.NextStands(c, mac(20)), ErrRotation)
	wantErr(t, r.NextStands(other, mac(30)), ErrLease)
	check(t, r.NextStands(c, mac(30)))
	check(t, r.NextStands(c, mac(30)))
	check(t, r.NextHeader(c, nextHeader(r, 30)))
	wantErr(t, r.NextHeader(c, nextHeader(r, 40)), ErrOtherNext)
	wantErr(t, r.AbandonRotation(false), ErrRotating)
	wantErr(t, r.Rotated(c, 2, mac(20), now), ErrRotation)
	wantErr(t, r.Rotated(c, 1, mac(30), now), ErrRotation)
	wantErr(t, r.Rotated(other, 2, mac(30), now), ErrLease)
	check(t, r.check())
	check(t, r.Rotated(c, 2, mac(30), now))
	check(t, r.Rotated(c, 2, mac(30), now))
	wantErr(t, r.Rotated(other, 2, mac(30), now), ErrLease)
	check(t, r.check())
	if r.State != Active || r.KeyVersion != 2 || len(r.Keys) != 1 || r.Keys[0].Version != 2 || r.HeaderMAC != strings.Repeat("1e", 32) || r.Rotation != nil {
		t.Errorf("record is %+v", r)
	}
}

// The vector of docs/spec/volume-record.md.
func TestARecordOfAChangeHasItsVector(t *testing.T) {
	body := `{"volume_id":"data-1","state":"rotating","revision":5,"generation":1,"owner":"guest-data","luks_uuid":"11111111-2222-3333-4444-555555555555","key_version":1,"keys":[{"version":1,"length":32,"wrapped":{"scheme":"hkdf-sha256","kek":"cluster:0001020304050607"}},{"version":2,"length":32,"wrapped":{"scheme":"hkdf-sha256","kek":"cluster:0001020304050607"}}],"header_mac":"0707070707070707070707070707070707070707070707070707070707070707","copy_macs":["0808080808080808080808080808080808080808080808080808080808080808","0909090909090909090909090909090909090909090909090909090909090909"],"last_version":2,"rotation":{"key_version":2,"header_mac":"0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a","copy_macs":["0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b","0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c"],"stands":true},"rotate":{"due":"2026-01-02T03:04:05Z","every_s":7776000},"created":"2026-01-02T03:04:05Z","updated":"2026-01-02T03:04:06Z"}`
	r, err := Parse("data-1", []byte(body))
	check(t, err)
	n, err := r.Next()
	check(t, err)
	if b, _, err := n.Binding(); err != nil || b.Version != 2 || !n.Rotation.Stands || r.Rotate.EveryS != 90*86400 {
		t.Errorf("record is %+v, its next key %+v, %v", r, b, err)
	}
	for what, change := range map[string][2]string{
		"without a rotation":         {`"rotation":{`, `"rotation":{"x":1,`},
		"of a version it has":        {`"rotation":{"key_version":2`, `"rotation":{"key_version":1`},
		"of a version without a key": {`"rotation":{"key_version":2`, `"rotation":{"key_version":3`},
		"of another last version":    {`"last_version":2`, `"last_version":4`},
		"active with one":            {`"state":"rotating"`, `"state":"active"`},
		"due never":                  {`"due":"2026-01-02T03:04:05Z"`, `"due":"0001-01-01T00:00:00Z"`},
		"due each second":            {`"every_s":7776000`, `"every_s":1`},
		"one MAC of a copy":          {`,"0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c"`, ``},
	} {
		bad := strings.Replace(body, change[0], change[1], 1)
		if _, err := Parse("data-1", []byte(bad)); bad == body || !errors.Is(err, ErrRecord) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestAVersionOfAKeyIsNeverMadeTwice(t *testing.T) {
	r, _ := rotatable()
	var seen []uint32
	for range 3 {
		k := nextKey(r)
		check(t, r.BeginRotation(k))
		check(t, r.AbandonRotation(false))
		check(t, r.check())
		if r.KeyVersion != 1 || len(r.Keys) != 1 || slices.Contains(seen, k.Version) {
			t.Fatalf("version %d again, of %v; record %+v", k.Version, seen, r)
		}
		seen = append(seen, k.Version)
	}
	check(t, r.BeginRotation(nextKey(r)))
	k := nextKey(r)
	check(t, r.Reset(k))
	check(t, r.check())
	if k.Version != 6 || r.KeyVersion != 6 {
		t.Errorf("the next life has key version %d", r.KeyVersion)
	}
}

func TestAWishIsOneOnceOrAgain(t *testing.T) {
	clock := newClock()
	for _, every := range []time.Duration{0, 24 * time.Hour} {
		r, c := rotatable()
		if r.Wants(clock.now()) {
			t.Fatal("nobody wished anything")
		}
		check(t, r.Ask(every, clock.now()))
		check(t, r.check())
		if !r.Wants(clock.now()) {
			t.Fatal("a wish is not due")
		}
		check(t, r.BeginRotation(nextKey(r)))
		check(t, r.NextHeader(c, nextHeader(r, 20)))
		check(t, r.NextStands(c, mac(20)))
		if !r.Wants(clock.now()) {
			t.Fatal("a rotation that is under way has to be finished")
		}
		check(t, r.Rotated(c, 2, mac(20), clock.now()))
		check(t, r.check())
		if r.Wants(clock.now().Add(every-time.Second)) || r.Wants(clock.now().Add(every)) != (every > 0) {
			t.Errorf("every %s: %+v", every, r.Rotate)
		}
		check(t, r.AbandonRotation(false))
		if r.Rotate != nil {
			t.Error("the wish was not withdrawn")
		}
	}
	r, _ := rotatable()
	wantErr(t, r.Ask(time.Minute, clock.now()), ErrRotation)
	wantErr(t, r.Ask(-time.Hour, clock.now()), ErrRotation)
	r.CopyMACs = nil // of version 1
	wantErr(t, r.BeginRotation(nextKey(r)), ErrNoRotation)
	r.CopyMACs = []string{r.HeaderMAC, r.HeaderMAC} // of a key that opens no disk
	wantErr(t, r.Ask(0, clock.now()), ErrNoRotation)
	wantErr(t, r.BeginRotation(nextKey(r)), ErrNoRotation)
	for s, r := range states() {
		if !s.HoldsData() {
			wantErr(t, r.Ask(0, clock.now()), ErrTransition)
		}
	}
}

// An operator's word ends a change at any time, and a retired volume has none.
func TestAChangeOfTheKeyEndsByAnOperatorsWord(t *testing.T) {
	r, c := rotatable()
	check(t, r.BeginRotation(nextKey(r)))
	check(t, r.NextHeader(c, nextHeader(r, 20)))
	check(t, r.NextStands(c, mac(20)))
	retired := *r
	check(t, retired.Retire())
	check(t, retired.check())
	wantErr(t, r.AbandonRotation(true), ErrRotating) // its holder would go on
	r.End()
	wantErr(t, r.AbandonRotation(false), ErrRotating)
	check(t, r.AbandonRotation(true))
	check(t, r.check())
	if r.State != Active || r.KeyVersion != 1 || len(r.Keys) != 1 {
		t.Errorf("record is %+v", r)
	}
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
