package endorsement

import (
	"context"
	"errors"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"
	"time"
)

const amd = "https://kdsintf.amd.com"

// mirrored is a source whose vendor is h.
func mirrored(t *testing.T, h http.HandlerFunc, opts HTTPOptions) *HTTP {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	opts.Hosts = []string{amd}
	opts.Mirrors = map[string]string{amd: srv.URL + "/base"}
	opts.Client = srv.Client()
	s, err := NewHTTP(opts)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

var milan = Request{Name: "snp-crl-Milan", URL: amd + "/vcek/v1/Milan/crl?a=1&b=2"}

func TestAMirrorStandsInForAVendor(t *testing.T) {
	s := mirrored(t, func(w http.ResponseWriter, r *http.Request) {
		if r.RequestURI != "/base/vcek/v1/Milan/crl?a=1&b=2" || r.Header.Get("Key") != "k" {
			t.Errorf("%s, %v", r.RequestURI, r.Header)
		}
		w.Header().Set("Issuer-Chain", url.PathEscape("-----BEGIN CERTIFICATE-----\n+/=\n"))
		_, _ = w.Write([]byte("crl"))
	}, HTTPOptions{Header: http.Header{"Key": {"k"}}})
	r := milan
	r.ChainHeader = "Issuer-Chain"
	d, err := s.Get(t.Context(), r)
	if err != nil || string(d.Body) != "crl" || string(d.Chain) != "-----BEGIN CERTIFICATE-----\n+/=\n" {
		t.Errorf("%q, %v", d, err)
	}
}

func TestAVendorsFaultsHaveNames(t *testing.T) {
	status := func(code int, header ...string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			for i := 0; i+1 < len(header); i += 2 {
				w.Header().Set(header[i], header[i+1])
			}
			w.WriteHeader(code)
		}
	}
	body := func(size int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			part := make([]byte, 64<<10)
			for n := 0; size < 0 || n < size; n += len(part) {
				if _, err := w.Write(part); err != nil {
					return
				}
			}
		}
	}
	for name, tc := range map[string]struct {
		vendor http.HandlerFunc
		want   error
		after  time.Duration
		silent bool
	}{
		"404":               {status(404), ErrNotFound, 0, false},
		"400":               {status(400), ErrNotFound, 0, false},
		"403":               {status(403), ErrUnavailable, 0, false},
		"429":               {status(429), ErrUnavailable, 0, false},
		"429 with seconds":  {status(429, "Retry-After", "10"), ErrUnavailable, 10 * time.Second, false},
		"429 for ever":      {status(429, "Retry-After", "99999999"), ErrUnavailable, 24 * time.Hour, false},
		"429 with nonsense": {status(429, "Retry-After", "-1"), ErrUnavailable, 0, false},
		"503 with a date":   {status(503, "Retry-After", "Sun, 06 Nov 1994 08:50:37 GMT", "Date", "Sun, 06 Nov 1994 08:49:37 GMT"), ErrUnavailable, time.Minute, false},
		"500":               {status(500), ErrUnavailable, 0, false},
		"nothing":           {status(200), ErrUnavailable, 0, false},
		"too much":          {body(MaxDocument + 1), ErrUnavailable, 0, false},
		"endless":           {body(-1), ErrUnavailable, 0, false},
		"no chain":          {func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte("x")) }, ErrUnavailable, 0, false},
		"chain not escaped": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Chain", "%zz")
			_, _ = w.Write([]byte("x"))
		}, ErrUnavailable, 0, false},
		"redirect elsewhere":   {status(302, "Location", "https://elsewhere.example/"), ErrUnavailable, 0, true},
		"redirect without end": {status(302, "Location", "/again"), ErrUnavailable, 0, true},
		"hangs":                {func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, ErrUnavailable, 0, true},
		"hangs in the middle": {func(w http.ResponseWriter, r *http.Request) {
			_, _ = w.Write([]byte("x"))
			w.(http.Flusher).Flush()
			<-r.Context().Done()
		}, ErrUnavailable, 0, true},
		"closes the connection": {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, ErrUnavailable, 0, true},
		"is a chain of too much": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Chain", strings.Repeat("a", MaxDocument+1))
			_, _ = w.Write([]byte("x"))
		}, ErrUnavailable, 0, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := mirrored(t, tc.vendor, HTTPOptions{Timeout: time.Second})
			r := milan
			if strings.Contains(name, "chain") {
				r.ChainHeader = "Chain"
			}
			_, err := s.Get(t.Context(), r)
			if !errors.Is(err, tc.want) {
				t.Fatal(err)
			}
			var u *UnavailableError
			if errors.As(err, &u) && (u.RetryAfter != tc.after || u.Silent != tc.silent) {
				t.Errorf("%+v", u)
			}
		})
	}
}

func TestRedirectsWithinAnOriginAreFollowed(t *testing.T) {
	s := mirrored(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/there" {
			http.Redirect(w, r, "/there", http.StatusFound)
			return
		}
		_, _ = w.Write([]byte("found"))
	}, HTTPOptions{})
	if d, err := s.Get(t.Context(), milan); err != nil || string(d.Body) != "found" {
		t.Errorf("%q, %v", d.Body, err)
	}
}

func TestOnlyListedOriginsAreAsked(t *testing.T) {
	s := mirrored(t, func(http.ResponseWriter, *http.Request) { t.Error("somebody was asked") }, HTTPOptions{})
	for _, target := range []string{
		"", "vcek/v1", "http://kdsintf.amd.com/crl", "https://kdsintf.amd.com:444/crl", "https://kdsintf.amd.com.evil.example/crl",
		"https://user@kdsintf.amd.com/crl", "https://kdsintf.amd.com/../x", "https://other.example/", "ftp://kdsintf.amd.com/", "https://kdsintf.amd.com/x#y", "https://[",
	} {
		if _, err := s.Get(t.Context(), Request{Name: "n", URL: target}); !errors.Is(err, ErrNotAllowed) {
			t.Errorf("%q: %v", target, err)
		}
	}
	none, err := NewHTTP(HTTPOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := none.Get(t.Context(), milan); !errors.Is(err, ErrNotAllowed) {
		t.Error(err)
	}
}

func TestAConfigurationThatIsNotOneIsRefused(t *testing.T) {
	for name, opts := range map[string]HTTPOptions{
		"http vendor":           {Hosts: []string{"http://kdsintf.amd.com"}},
		"vendor with a path":    {Hosts: []string{amd + "/vcek"}},
		"vendor without scheme": {Hosts: []string{"kdsintf.amd.com"}},
		"not a URL":             {Hosts: []string{"https://["}},
		"mirror of nobody":      {Mirrors: map[string]string{amd: "https://mirror.example"}},
		"http mirror":           {Hosts: []string{amd}, Mirrors: map[string]string{amd: "http://mirror.example"}},
		"mirror with a secret":  {Hosts: []string{amd}, Mirrors: map[string]string{amd: "https://u:p@mirror.example"}},
		"mirror with a query":   {Hosts: []string{amd}, Mirrors: map[string]string{amd: "https://mirror.example/?a"}},
		"mirror of no URL":      {Hosts: []string{amd}, Mirrors: map[string]string{amd: "https://["}},
	} {
		if _, err := NewHTTP(opts); err == nil {
			t.Errorf("%s is accepted", name)
		}
	}
}

func TestACancelledCallerGetsItsOwnError(t *testing.T) {
	s := mirrored(t, func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() }, HTTPOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := s.Get(ctx, milan); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
}
