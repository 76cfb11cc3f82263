package endorsement

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// vendor is a source that counts its questions.
type vendor struct {
	asked atomic.Int64
	get   func(ctx context.Context, r Request) (Document, error)
}

func (v *vendor) Get(ctx context.Context, r Request) (Document, error) {
	v.asked.Add(1)
	return v.get(ctx, r)
}

// slow answers after d, if it is let.
func slow(d time.Duration) func(context.Context, Request) (Document, error) {
	return func(ctx context.Context, r Request) (Document, error) {
		select {
		case <-time.After(d):
			return Document{Body: []byte("of " + r.Name)}, nil
		case <-ctx.Done():
			return Document{}, ctx.Err()
		}
	}
}

func failing(err error) func(context.Context, Request) (Document, error) {
	return func(context.Context, Request) (Document, error) { return Document{}, err }
}

func newCache(t *testing.T, opts CacheOptions) *Cache {
	t.Helper()
	c, err := NewCache(opts)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

var vcek = Request{Name: "snp-vcek", URL: "https://vendor.example/vcek"}

func TestAThousandCallersAskAVendorOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vendor{get: slow(10 * time.Second)} // as AMD's service answers when it is asked often
		c := newCache(t, CacheOptions{Source: v})
		start := time.Now()
		var wg sync.WaitGroup
		for range 1000 {
			wg.Go(func() {
				if d, err := c.Get(t.Context(), vcek); err != nil || string(d.Body) != "of snp-vcek" {
					t.Errorf("%q, %v", d.Body, err)
				}
			})
		}
		wg.Wait()
		if n, took := v.asked.Load(), time.Since(start); n != 1 || took != 10*time.Second {
			t.Errorf("%d questions in %s", n, took)
		}
		if _, err := c.Get(t.Context(), vcek); err != nil || v.asked.Load() != 1 {
			t.Errorf("%v after %d questions", err, v.asked.Load())
		}
	})
}

func TestAHungVendorIsAskedOnceAMinuteForEverybody(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vendor{get: slow(time.Hour)}
		c := newCache(t, CacheOptions{Source: v})
		for minute := range 3 {
			var wg sync.WaitGroup
			start := time.Now()
			for range 1000 {
				wg.Go(func() {
					if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrUnavailable) {
						t.Error(err)
					}
				})
			}
			wg.Wait()
			if took := time.Since(start); took > 20*time.Second {
				t.Errorf("somebody waited %s", took)
			}
			synctest.Wait()
			// Another name of the same vendor's is not asked for either.
			other := Request{Name: "snp-crl", URL: "https://vendor.example/crl"}
			start = time.Now()
			if _, err := c.Get(t.Context(), other); !errors.Is(err, ErrUnavailable) || time.Since(start) > 0 {
				t.Errorf("%v after %s", err, time.Since(start))
			}
			if n := v.asked.Load(); n != int64(minute)+1 {
				t.Errorf("%d questions in minute %d", n, minute)
			}
			time.Sleep(time.Minute)
		}
	})
}

// A source that does not heed its context holds nobody up for long.
func TestADeafSourceHoldsNobodyUp(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vendor{get: func(context.Context, Request) (Document, error) {
			time.Sleep(time.Hour)
			return Document{Body: []byte("late")}, nil
		}}
		c := newCache(t, CacheOptions{Source: v})
		for _, want := range []time.Duration{20 * time.Second, 0} {
			start := time.Now()
			if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrUnavailable) || time.Since(start) != want {
				t.Errorf("%v after %s", err, time.Since(start))
			}
		}
	})
}

func TestACallerWhoGivesUpFailsNobodyElse(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vendor{get: slow(5 * time.Second)}
		c := newCache(t, CacheOptions{Source: v})
		impatient, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Get(impatient, vcek); !errors.Is(err, context.DeadlineExceeded) {
				t.Error(err)
			}
		})
		synctest.Wait()
		wg.Go(func() {
			if _, err := c.Get(t.Context(), vcek); err != nil {
				t.Error(err)
			}
		})
		wg.Wait()
		if v.asked.Load() != 1 {
			t.Errorf("%d questions", v.asked.Load())
		}
	})
}

func TestFailuresAreRememberedForAWhile(t *testing.T) {
	for name, tc := range map[string]struct {
		err   error
		again time.Duration
	}{
		"unknown":             {ErrNotFound, time.Minute},
		"unavailable":         {&UnavailableError{Err: errors.New("500")}, time.Minute},
		"asks for five":       {&UnavailableError{Err: errors.New("429"), RetryAfter: 5 * time.Minute}, 5 * time.Minute},
		"asks for a day":      {&UnavailableError{Err: errors.New("429"), RetryAfter: 24 * time.Hour}, maxRetryAfter},
		"asks for an instant": {&UnavailableError{Err: errors.New("429"), RetryAfter: time.Second}, time.Minute},
		"nobody was asked":    {ErrNotAllowed, 0},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				v := &vendor{get: failing(tc.err)}
				c := newCache(t, CacheOptions{Source: v})
				start := time.Now()
				for range 3 {
					if _, err := c.Get(t.Context(), vcek); !errors.Is(err, tc.err) {
						t.Error(err)
					}
				}
				if tc.again == 0 {
					if v.asked.Load() != 3 {
						t.Errorf("%d questions", v.asked.Load())
					}
					return
				}
				for v.asked.Load() == 1 {
					time.Sleep(time.Second)
					_, _ = c.Get(t.Context(), vcek)
				}
				if took := time.Since(start); took != tc.again {
					t.Errorf("asked again after %s", took)
				}
			})
		})
	}
}

func TestAStaleDocumentIsReplacedAndNeverServed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// A document is stale after an hour.
		version := 0
		var down atomic.Bool
		v := &vendor{}
		v.get = func(context.Context, Request) (Document, error) {
			if down.Load() {
				return Document{}, &UnavailableError{Err: errors.New("500")}
			}
			version++
			return Document{Body: []byte(time.Now().Add(time.Hour).Format(time.RFC3339))}, nil
		}
		crl := Request{Name: "snp-crl", Fresh: func(d Document, now time.Time) bool {
			until, err := time.Parse(time.RFC3339, string(d.Body))
			return err == nil && now.Before(until)
		}}
		c := newCache(t, CacheOptions{Source: v, Dir: t.TempDir()})
		get := func() error { _, err := c.Get(t.Context(), crl); return err }
		if err := errors.Join(get(), get()); err != nil || version != 1 {
			t.Fatalf("%v, version %d", err, version)
		}
		time.Sleep(time.Hour)
		if err := get(); err != nil || version != 2 {
			t.Fatalf("%v, version %d", err, version)
		}
		time.Sleep(time.Hour)
		down.Store(true)
		if err := get(); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
		// What a vendor sends in its place is not served either.
		down.Store(false)
		v.get = func(context.Context, Request) (Document, error) { return Document{Body: []byte("lies")}, nil }
		time.Sleep(time.Minute)
		if err := get(); !errors.Is(err, ErrUnavailable) {
			t.Fatal(err)
		}
	})
}

func giving(d Document) func(context.Context, Request) (Document, error) {
	return func(context.Context, Request) (Document, error) { return d, nil }
}

// fetched has another process fetch the certificate.
func fetched(t *testing.T, dir string, d Document) {
	t.Helper()
	if _, err := newCache(t, CacheOptions{Dir: dir, Source: &vendor{get: giving(d)}}).Get(t.Context(), vcek); err != nil {
		t.Fatal(err)
	}
}

func TestDocumentsOutliveTheProcess(t *testing.T) {
	dir := t.TempDir()
	d := Document{Body: []byte("body"), Chain: []byte("chain")}
	fetched(t, dir, d)
	v := &vendor{get: failing(ErrNotFound)}
	got, err := newCache(t, CacheOptions{Dir: dir, Source: v}).Get(t.Context(), vcek)
	if err != nil || !bytes.Equal(got.Body, d.Body) || !bytes.Equal(got.Chain, d.Chain) || v.asked.Load() != 0 {
		t.Errorf("%q, %v, %d questions", got, err, v.asked.Load())
	}
}

// What another process pre-fetches serves a vendor's outage out.
func TestAStoredDocumentEndsAnOutage(t *testing.T) {
	dir := t.TempDir()
	c := newCache(t, CacheOptions{Dir: dir, Source: &vendor{get: failing(&UnavailableError{Err: errors.New("down")})}})
	if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	fetched(t, dir, Document{Body: []byte("b")})
	if _, err := c.Get(t.Context(), vcek); err != nil {
		t.Fatal(err)
	}
}

func TestADamagedFileIsAMiss(t *testing.T) {
	good := encode(Document{Body: []byte("body"), Chain: []byte("chain")})
	cut := func(n int) []byte { return good[:n] }
	flip := func(i int) []byte { b := bytes.Clone(good); b[i] ^= 1; return b }
	for name, put := range map[string]func(path string) error{
		"empty":       func(p string) error { return os.WriteFile(p, nil, 0o600) },
		"cut":         func(p string) error { return os.WriteFile(p, cut(len(good)-1), 0o600) },
		"head only":   func(p string) error { return os.WriteFile(p, cut(head), 0o600) },
		"other magic": func(p string) error { return os.WriteFile(p, flip(0), 0o600) },
		"length":      func(p string) error { return os.WriteFile(p, flip(len(magic)), 0o600) },
		"flipped bit": func(p string) error { return os.WriteFile(p, flip(head), 0o600) },
		"too large":   func(p string) error { return os.WriteFile(p, make([]byte, maxFile+1), 0o600) },
		"directory":   func(p string) error { return os.Mkdir(p, 0o700) },
		"pipe":        func(p string) error { return syscall.Mkfifo(p, 0o600) },
		"link out":    func(p string) error { return os.Symlink("/etc/passwd", p) },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			v := &vendor{get: failing(ErrNotFound)}
			c := newCache(t, CacheOptions{Dir: dir, Source: v})
			if err := os.WriteFile(filepath.Join(dir, "other.doc"), good, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := put(filepath.Join(dir, vcek.Name+extension)); err != nil {
				t.Fatal(err)
			}
			if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrNotFound) || v.asked.Load() != 1 {
				t.Errorf("%v after %d questions", err, v.asked.Load())
			}
		})
	}
}

func TestNamesThatAreNotFileNamesAreRefused(t *testing.T) {
	c := newCache(t, CacheOptions{Dir: t.TempDir(), Source: &vendor{get: slow(0)}})
	for _, name := range []string{"", ".", "..", "../x", "a/b", ".hidden", "a\x00b", "a b", "ä", strings.Repeat("a", 201)} {
		if _, err := c.Get(t.Context(), Request{Name: name}); !errors.Is(err, errName) {
			t.Errorf("%q: %v", name, err)
		}
	}
}

func TestACacheIsBounded(t *testing.T) {
	dir := t.TempDir()
	v := &vendor{get: func(_ context.Context, r Request) (Document, error) {
		if strings.HasPrefix(r.Name, "no") {
			return Document{}, ErrNotFound
		}
		return Document{Body: []byte(r.Name)}, nil
	}}
	c := newCache(t, CacheOptions{Dir: dir, Source: v, MaxEntries: 4})
	for i := range 20 {
		for _, kind := range []string{"no", "yes"} {
			_, _ = c.Get(t.Context(), Request{Name: kind + strconv.Itoa(i)})
		}
	}
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 4 || len(c.docs) != 4 || c.used.Len() != 4 || len(c.failed) > 4 {
		t.Errorf("%d files, %d documents, %d failures, %v", len(files), len(c.docs), len(c.failed), err)
	}
	if _, err := os.Stat(filepath.Join(dir, "yes19.doc")); err != nil {
		t.Error(err)
	}
	big := newCache(t, CacheOptions{Source: &vendor{get: giving(Document{Body: make([]byte, MaxDocument)})}})
	for i := range 70 {
		if _, err := big.Get(t.Context(), Request{Name: "d" + strconv.Itoa(i)}); err != nil {
			t.Fatal(err)
		}
	}
	if big.size > maxMemory {
		t.Errorf("%d bytes", big.size)
	}
}

func TestOnlySoManyNamesAreAskedForAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		v := &vendor{get: slow(time.Second)}
		c := newCache(t, CacheOptions{Source: v})
		var refused atomic.Int64
		var wg sync.WaitGroup
		for i := range 1000 {
			wg.Go(func() {
				_, err := c.Get(t.Context(), Request{Name: "chip" + strconv.Itoa(i)})
				if errors.Is(err, ErrUnavailable) {
					refused.Add(1)
				} else if err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
		if v.asked.Load() != maxFlights || refused.Load() != 1000-maxFlights {
			t.Errorf("%d questions, %d refused", v.asked.Load(), refused.Load())
		}
	})
}

func TestACloseEndsWhatIsOnItsWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCache(t, CacheOptions{Source: &vendor{get: slow(time.Hour)}})
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrUnavailable) {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if _, err := c.Get(t.Context(), vcek); !errors.Is(err, ErrUnavailable) {
			t.Error(err)
		}
	})
}

func FuzzStoredDocument(f *testing.F) {
	f.Add(encode(Document{Body: []byte("body"), Chain: []byte("chain")}))
	f.Add(encode(Document{Body: []byte("body")}))
	f.Fuzz(func(t *testing.T, data []byte) {
		d, ok := decode(data)
		if ok && !bytes.Equal(encode(d), data) {
			t.Fatal("a document has two forms")
		}
	})
}
