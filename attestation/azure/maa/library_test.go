//go:build !keyagent_nomaa

package maa

import (
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
)

func TestAnAnswerIsBounded(t *testing.T) {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		for range 100 {
			if _, err := w.Write(make([]byte, 1<<16)); err != nil {
				return
			}
		}
	}))
	defer srv.Close()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL, nil)
	if err != nil {
		t.Fatal(err)
	}
	rsp, err := (bounded{srv.Client()}).Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer rsp.Body.Close()
	if data, err := io.ReadAll(rsp.Body); err != nil || len(data) != maxAnswer {
		t.Errorf("%d bytes, %v", len(data), err)
	}
}
