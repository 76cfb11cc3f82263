package unseal

import (
	"errors"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/shares"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// split makes shares, and a function that copies one: who gives a share loses it.
func split(t *testing.T, threshold, n int) (*shares.Sealed, func(i int) *shares.Share, *secret.Bytes) {
	t.Helper()
	master, err := secret.From([]byte(strings.Repeat("m", 32)))
	must(t, err)
	s, all, err := shares.Split(master, threshold, n)
	must(t, err)
	data, err := s.Encode()
	must(t, err)
	s, err = shares.ParseSealed(data)
	must(t, err)
	t.Cleanup(func() {
		master.Close()
		for _, share := range all {
			share.Close()
		}
	})
	return s, func(i int) *shares.Share {
		t.Helper()
		text, err := all[i-1].Encode()
		must(t, err)
		defer text.Close()
		share, err := shares.ParseShare(text)
		must(t, err)
		return share
	}, master
}

func TestSharesAreGatheredUntilThereAreEnough(t *testing.T) {
	s, share, master := split(t, 3, 5)
	_, other, _ := split(t, 3, 5)
	now := time.Unix(0, 0)
	g := NewGatherer(s, func() time.Time { return now })
	defer g.Close()
	give := func(sh *shares.Share, want error, have int) {
		t.Helper()
		p, err := g.Give(sh)
		if !errors.Is(err, want) || p.Have != have || p.Split != s.ID() || p.Threshold != 3 || p.Unsealed {
			t.Errorf("%+v, %v", p, err)
		}
	}
	give(share(2), nil, 1)
	give(share(2), nil, 1)
	give(other(3), shares.ErrForeign, 1)
	give(share(5), nil, 2)
	now = now.Add(keepFor - time.Second)
	if n := g.Expire(); n != 0 {
		t.Errorf("%d were forgotten early", n)
	}
	now = now.Add(time.Second)
	if p := g.Progress(); p.Have != 0 {
		t.Errorf("after an hour it has %d", p.Have)
	}
	give(share(2), nil, 1)
	give(share(5), nil, 2)
	select {
	case <-g.Opened():
		t.Fatal("it opened with two")
	default:
	}
	p, err := g.Give(share(1))
	if err != nil || !p.Unsealed {
		t.Fatalf("%+v, %v", p, err)
	}
	got := <-g.Opened()
	defer got.Close()
	if !got.Equal(master) {
		t.Error("another secret came out")
	}
	if _, err := g.Give(share(4)); !errors.Is(err, ErrDone) {
		t.Error(err)
	}
}

// The same share from many at once is one, and what opens it does so once.
func TestManyGiveAtOnce(t *testing.T) {
	s, share, _ := split(t, 3, 5)
	g := NewGatherer(s, time.Now)
	defer g.Close()
	var wg sync.WaitGroup
	for i := range 10 {
		sh := share(i%5 + 1)
		wg.Go(func() {
			if _, err := g.Give(sh); err != nil && !errors.Is(err, ErrDone) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	(<-g.Opened()).Close()
	select {
	case <-g.Opened():
		t.Error("it opened twice")
	default:
	}
}

// Right shares of a file that was changed: all is forgotten, and it waits on.
func TestASealedFileThatWasChanged(t *testing.T) {
	s, share, _ := split(t, 2, 2)
	s.Box[0] ^= 1
	g := NewGatherer(s, time.Now)
	defer g.Close()
	_, err := g.Give(share(1))
	must(t, err)
	if p, err := g.Give(share(2)); err == nil || !strings.Contains(err.Error(), "not what they sealed") || p.Unsealed {
		t.Errorf("%+v, %v", p, err)
	}
	if p := g.Progress(); p.Have != 0 {
		t.Errorf("%+v", p)
	}
}

// The master secret may come in another way: the shares that there are go, and it comes once.
func TestTheSecretComesInAnotherWay(t *testing.T) {
	s, share, master := split(t, 2, 3)
	g := NewGatherer(s, time.Now)
	defer g.Close()
	_, err := g.Give(share(1))
	must(t, err)
	for _, first := range []bool{true, false} {
		c, err := master.Clone()
		must(t, err)
		if ok, err := g.Take(c); ok != first || err != nil {
			t.Errorf("%v, %v", ok, err)
		}
	}
	if p := g.Progress(); !p.Unsealed || p.Have != 0 || g.Used() != "" {
		t.Errorf("%+v", p)
	}
	if _, err := g.Give(share(2)); !errors.Is(err, ErrDone) {
		t.Error(err)
	}
	got := <-g.Opened()
	defer got.Close()
	if !got.Equal(master) {
		t.Error("another secret came out")
	}
}
