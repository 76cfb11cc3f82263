package kms

import (
	"fmt"
	"maps"
	"net/url"
	"slices"
)

// URI names a backend and its parameters: SCHEME://NAME?key=value&…
type URI struct {
	Scheme string // "kms" or "storage"
	Name   string // of the backend
	params map[string]string
	taken  map[string]bool
}

// ParseURI splits a URI. Each parameter may stand in it once, and is unescaped
// once. User names, ports, paths and fragments are refused: they would mean
// nothing.
func ParseURI(s string) (*URI, error) {
	if len(s) > 4096 {
		return nil, fmt.Errorf("%w: longer than 4096 bytes", ErrURI)
	}
	u, err := url.Parse(s)
	if err != nil {
		// The parser's own error repeats the URI.
		return nil, fmt.Errorf("%w: not of the form kms://NAME?key=value", ErrURI)
	}
	switch {
	case u.Scheme != "kms" && u.Scheme != "storage":
		return nil, fmt.Errorf("%w: must begin with kms:// or storage://", ErrURI)
	case u.Host == "" || u.Port() != "" || u.User != nil || u.Opaque != "" || u.Fragment != "" || (u.Path != "" && u.Path != "/"):
		return nil, fmt.Errorf("%w: must be of the form %s://NAME?key=value", ErrURI, u.Scheme)
	}
	values, err := url.ParseQuery(u.RawQuery)
	if err != nil {
		return nil, fmt.Errorf("%w: its parameters are not properly escaped", ErrURI)
	}
	out := &URI{Scheme: u.Scheme, Name: u.Host, params: map[string]string{}, taken: map[string]bool{}}
	for k, v := range values {
		if len(v) != 1 {
			return nil, fmt.Errorf("%w: parameter %q stands in it %d times", ErrURI, k, len(v))
		}
		out.params[k] = v[0]
	}
	return out, nil
}

// Required takes a parameter that must be there.
func (u *URI) Required(key string) (string, error) {
	v := u.Optional(key)
	if v == "" {
		return "", fmt.Errorf("%w: %s://%s needs the parameter %q", ErrURI, u.Scheme, u.Name, key)
	}
	return v, nil
}

// Optional takes a parameter that may be absent.
func (u *URI) Optional(key string) string {
	u.taken[key] = true
	return u.params[key]
}

// Done refuses parameters that nobody took.
func (u *URI) Done() error {
	for _, k := range slices.Sorted(maps.Keys(u.params)) {
		if !u.taken[k] {
			return fmt.Errorf("%w: %s://%s does not know the parameter %q", ErrURI, u.Scheme, u.Name, k)
		}
	}
	return nil
}
