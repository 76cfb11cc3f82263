package endpoint

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

func TestNothingIsSentWhereOthersListen(t *testing.T) {
	for endpoint, c := range map[string]struct{ loopback, ok bool }{
		"https://example.com":         {false, true},
		"https://127.0.0.1:1/account": {false, true},
		"http://127.0.0.1:9000":       {true, true},
		"http://[::1]:9000":           {true, true},
		"http://localhost:9000":       {}, // a name, whatever it stands for
		"http://192.0.2.1":            {},
		"ftp://127.0.0.1":             {},
		"https://":                    {},
		"https://hunter2@example.com": {},
		"https://example.com?hunter2": {},
		"https://example.com#hunter2": {},
		"https://hunter2\x00":         {},
		"127.0.0.1:9000":              {},
		"unix:///run/x":               {},
	} {
		loopback, err := Check(endpoint)
		if loopback != c.loopback || (err == nil) != c.ok {
			t.Errorf("%q: %v, %v", endpoint, loopback, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error repeats what it must not: %v", err)
		}
	}
}

// Case 16: an answer that never ends costs no more than its bound.
func TestAnEndlessAnswerIsCutOff(t *testing.T) {
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/announced" {
			w.Header().Set("Content-Length", "1000000000")
			return
		}
		for range 100 {
			_, _ = w.Write(make([]byte, 1<<10))
		}
	}))
	defer server.Close()
	client := &http.Client{Transport: Limit(http.DefaultTransport, 64<<10)}
	for path, most := range map[string]int{"/": 64 << 10, "/announced": 0} {
		resp, err := client.Get(server.URL + path)
		if errors.Is(err, ErrTooMuch) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(resp.Body)
		resp.Body.Close()
		if !errors.Is(err, ErrTooMuch) || len(data) > most {
			t.Errorf("%s: %d bytes, %v", path, len(data), err)
		}
	}
	within := &http.Client{Transport: Limit(http.DefaultTransport, 100<<10)}
	resp, err := within.Get(server.URL)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if data, err := io.ReadAll(resp.Body); err != nil || len(data) != 100<<10 {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}
