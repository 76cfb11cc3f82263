package shares

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func masterOf(t testing.TB, text string) *secret.Bytes {
	t.Helper()
	m, err := secret.From([]byte(text))
	must(t, err)
	t.Cleanup(func() { m.Close() })
	return m
}

func split(t testing.TB, threshold, n int) (*Sealed, []*Share, *secret.Bytes) {
	t.Helper()
	master := masterOf(t, strings.Repeat("m", 32))
	s, all, err := Split(master, threshold, n)
	must(t, err)
	t.Cleanup(func() {
		for _, share := range all {
			share.Close()
		}
	})
	data, err := s.Encode()
	must(t, err)
	s, err = ParseSealed(data)
	must(t, err)
	return s, all, master
}

// copyOf is a share as it comes from its operator.
func copyOf(t testing.TB, s *Share, change func(*plainShare)) *Share {
	t.Helper()
	text, err := s.Encode()
	must(t, err)
	defer text.Close()
	var again *secret.Bytes
	must(t, text.Use(func(raw []byte) error {
		var p plainShare
		must(t, json.Unmarshal(raw, &p))
		if change != nil {
			change(&p)
		}
		data, err := json.Marshal(p)
		must(t, err)
		again, err = secret.From(data)
		return err
	}))
	defer again.Close()
	out, err := ParseShare(again)
	must(t, err)
	t.Cleanup(func() { out.Close() })
	return out
}

func TestAnyThreeOfFiveOpen(t *testing.T) {
	s, all, master := split(t, 3, 5)
	opened := 0
	for set := range 32 {
		var some []*Share
		for i, share := range all {
			if set>>i&1 == 1 {
				some = append(some, copyOf(t, share, nil))
			}
		}
		got, err := s.Open(some)
		switch {
		case len(some) < 3 && errors.Is(err, ErrTooFew):
			continue
		case err != nil || len(some) < 3:
			t.Fatalf("%d shares: %v", len(some), err)
		}
		opened++
		if !got.Equal(master) {
			t.Error("another secret came back")
		}
		got.Close()
	}
	if opened != 16 {
		t.Errorf("%d sets opened", opened)
	}
	_, err := s.Open(all[:2])
	if err == nil || !strings.Contains(err.Error(), "2 of the 3 that are needed") {
		t.Error(err)
	}
}

// A wrong share is named, and each that is.
func TestAWrongShareIsNamed(t *testing.T) {
	s, all, _ := split(t, 3, 5)
	_, others, _ := split(t, 3, 5)
	forged := copyOf(t, all[1], func(p *plainShare) { p.Value[0] ^= 1 })
	moved := copyOf(t, all[1], func(p *plainShare) { p.Index = 5 })
	beyond := copyOf(t, all[1], func(p *plainShare) { p.Index = 6 })
	zero := copyOf(t, all[1], func(p *plainShare) { p.Value = make([]byte, size) })
	renamed := copyOf(t, others[1], func(p *plainShare) { p.Split = s.ID() })
	for name, c := range map[string]struct {
		shares []*Share
		want   error
		text   string
	}{
		"forged":                {[]*Share{all[0], forged, all[2], all[3]}, ErrForged, "share 2: "},
		"another one's":         {[]*Share{all[0], moved, all[2]}, ErrForged, "share 5: "},
		"beyond the last":       {[]*Share{all[0], beyond, all[2]}, ErrForged, "share 6 of 5"},
		"of zeros":              {[]*Share{all[0], zero, all[2]}, ErrForged, "share 2: "},
		"of another split":      {[]*Share{all[0], others[1], all[2]}, ErrForeign, "share 2: "},
		"of another, renamed":   {[]*Share{all[0], renamed, all[2]}, ErrForged, "share 2: "},
		"twice":                 {[]*Share{all[0], all[2], copyOf(t, all[2], nil)}, ErrRepeated, "share 3: "},
		"twice is not one more": {[]*Share{all[0], all[2], all[2]}, ErrTooFew, "2 of the 3"},
		"two of them":           {[]*Share{forged, others[3], all[2]}, ErrForged, "share 4: "},
	} {
		got, err := s.Open(c.shares)
		if got != nil || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsSplitIsBounded(t *testing.T) {
	m := masterOf(t, strings.Repeat("m", 32))
	for _, c := range [][2]int{{0, 0}, {1, 1}, {1, 5}, {3, 2}, {2, 65}, {-1, 5}} {
		if _, _, err := Split(m, c[0], c[1]); !errors.Is(err, ErrSplit) {
			t.Errorf("%v: %v", c, err)
		}
	}
	for _, n := range []int{8, 65} {
		if _, _, err := Split(masterOf(t, strings.Repeat("m", n)), 2, 2); err == nil {
			t.Errorf("a secret of %d bytes was split", n)
		}
	}
	one, _, _ := split(t, 2, 2)
	two, _, _ := split(t, 2, 2)
	if one.ID() == two.ID() || bytes.Equal(one.Box, two.Box) {
		t.Error("two splits are one")
	}
}

// What is sealed is under what is shared, and nothing else of the file opens it.
func TestASealedSecretThatWasChangedDoesNotOpen(t *testing.T) {
	s, all, _ := split(t, 2, 3)
	for name, change := range map[string]func(*Sealed){
		"its box":         func(s *Sealed) { s.Box[3] ^= 1 },
		"its threshold":   func(s *Sealed) { s.Threshold = 3; s.Commitments = append(s.Commitments, s.Commitments[0]) },
		"its number":      func(s *Sealed) { s.Shares = 4 },
		"its length":      func(s *Sealed) { s.Length = 31 },
		"two commitments": func(s *Sealed) { s.Commitments[0], s.Commitments[1] = s.Commitments[1], s.Commitments[0] },
	} {
		data, err := s.Encode()
		must(t, err)
		changed, err := ParseSealed(data)
		must(t, err)
		change(changed)
		data, err = changed.Encode()
		must(t, err)
		if changed, err = ParseSealed(data); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got, err := changed.Open(all); err == nil || got != nil {
			t.Errorf("%s: it opens", name)
		}
	}
}

// The vector of docs/spec/shares.md.
func TestTheVectorOpens(t *testing.T) {
	data, err := os.ReadFile("testdata/master.sealed")
	must(t, err)
	s, err := ParseSealed(data)
	must(t, err)
	var all []*Share
	lines, err := os.ReadFile("testdata/shares.jsonl")
	must(t, err)
	for line := range bytes.Lines(lines) {
		text, err := secret.From(bytes.Clone(line))
		must(t, err)
		share, err := ParseShare(text)
		must(t, err)
		all = append(all, share)
	}
	got, err := s.Open([]*Share{all[4], all[0], all[2]})
	must(t, err)
	must(t, got.Use(func(b []byte) error {
		if hex.EncodeToString(b) != "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f" {
			t.Errorf("%x", b)
		}
		return nil
	}))
}

func FuzzSealed(f *testing.F) {
	s, _, _ := split(f, 2, 3)
	data, err := s.Encode()
	must(f, err)
	f.Add(data)
	f.Add([]byte(`{"version":1}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := ParseSealed(data)
		if err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if err == nil && (len(s.points) != s.Threshold || s.Shares > MaxShares) {
			t.Fatalf("%+v", s)
		}
	})
}

func FuzzShare(f *testing.F) {
	f.Add([]byte(`{"version":1,"split":"000102030405060708090a0b0c0d0e0f","index":1,"value":"AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		if len(data) == 0 || len(data) > 4<<10 {
			return
		}
		text, err := secret.From(bytes.Clone(data))
		must(t, err)
		defer text.Close()
		s, err := ParseShare(text)
		if err != nil && !errors.Is(err, ErrFormat) {
			t.Fatal(err)
		}
		if err == nil {
			must(t, s.Close())
		}
	})
}
