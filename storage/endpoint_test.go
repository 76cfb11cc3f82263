package storage

import (
	"strings"
	"testing"
)

func TestObjectsGoOnlyWhereNobodyListens(t *testing.T) {
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
		loopback, err := CheckEndpoint(endpoint)
		if loopback != c.loopback || (err == nil) != c.ok {
			t.Errorf("%q: %v, %v", endpoint, loopback, err)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("the error repeats what it must not: %v", err)
		}
	}
}
