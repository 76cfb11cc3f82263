// Package endpoint bounds what keyagent does with a service that its operator
// names: where anything may be sent, and how much may come back.
package endpoint

import (
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
)

// Check returns an error unless endpoint is the URL of a service that keys and
// objects may be sent to: https, or http on a loopback address. loopback says that
// it is the latter. The errors do not repeat the URL, which may hold what it must
// not.
func Check(endpoint string) (loopback bool, err error) {
	u, err := url.Parse(endpoint)
	if err != nil || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return false, errors.New("the endpoint must be of the form https://HOST:PORT")
	}
	ip := net.ParseIP(u.Hostname())
	switch {
	case u.Scheme == "https":
		return false, nil
	case u.Scheme == "http" && ip != nil && ip.IsLoopback():
		return true, nil
	}
	return false, errors.New("the endpoint must be https, or http on a loopback address such as 127.0.0.1")
}

// ErrTooMuch: a service answers with more than anything that was asked for has.
var ErrTooMuch = errors.New("the answer is too long")

// Limit returns a transport whose answers have at most max bytes; reading further is
// [ErrTooMuch]. The clouds' SDKs read answers whole, and bound them by time alone.
func Limit(next http.RoundTripper, max int64) http.RoundTripper { return &limited{next, max} }

type limited struct {
	next http.RoundTripper
	max  int64
}

func (l *limited) RoundTrip(r *http.Request) (*http.Response, error) {
	resp, err := l.next.RoundTrip(r)
	if err != nil {
		return nil, err
	}
	return Bound(resp, l.max)
}

// Bound is what Limit does to one answer.
func Bound(resp *http.Response, max int64) (*http.Response, error) {
	if resp.ContentLength > max {
		resp.Body.Close()
		return nil, ErrTooMuch
	}
	resp.Body = &body{resp.Body, max}
	return resp, nil
}

type body struct {
	io.ReadCloser
	left int64
}

func (b *body) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, ErrTooMuch
	}
	// One byte more than there may be tells an end from too much.
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		return n - 1, ErrTooMuch
	}
	return n, err
}
