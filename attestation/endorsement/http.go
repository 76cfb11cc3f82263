package endorsement

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/endpoint"
)

// maxRedirects of one request, all of them within one origin.
const maxRedirects = 3

// ErrNotAllowed means that a request names an origin that the configuration does
// not. Nobody was asked, and asking again does not help.
var ErrNotAllowed = errors.New("origin is not on the list of allowed ones")

// UnavailableError says more about an [ErrUnavailable], which it wraps.
type UnavailableError struct {
	// RetryAfter is what the vendor said, or 0.
	RetryAfter time.Duration
	// Silent means that the vendor gave no answer at all. What it knows of other
	// names is then not to be had either.
	Silent bool
	Err    error
}

func (e *UnavailableError) Error() string {
	text := ErrUnavailable.Error() + ": " + e.Err.Error()
	if e.RetryAfter > 0 {
		text += fmt.Sprintf(" (asks to be left alone for %s)", e.RetryAfter)
	}
	return text
}

// Unwrap implements the interface of package errors.
func (e *UnavailableError) Unwrap() []error { return []error{ErrUnavailable, e.Err} }

// HTTPOptions configure [NewHTTP]. Unset fields take the stated default.
type HTTPOptions struct {
	// Client sends the requests; its CheckRedirect is not used. Default a client
	// of its own, with the system's roots and the proxy of the environment.
	Client *http.Client
	// Timeout bounds one request with its body. Default 10 seconds.
	Timeout time.Duration
	// Hosts are the origins that may be asked, such as
	// "https://kdsintf.amd.com". Empty: none.
	Hosts []string
	// Mirrors send what is meant for an origin of Hosts to a base URL instead. It
	// is https, or http to this machine itself.
	Mirrors map[string]string
	// Header is sent with each request.
	Header http.Header
}

// HTTP asks vendors. One Get is one request: it repeats nothing and remembers
// nothing, which is the part of [Cache].
type HTTP struct {
	client  *http.Client
	timeout time.Duration
	header  http.Header
	targets map[string]*url.URL // by origin
}

var _ Source = (*HTTP)(nil)

// NewHTTP returns a source.
func NewHTTP(opts HTTPOptions) (*HTTP, error) {
	h := &HTTP{timeout: opts.Timeout, header: opts.Header.Clone(), targets: map[string]*url.URL{}}
	if h.timeout == 0 {
		h.timeout = 10 * time.Second
	}
	for _, text := range opts.Hosts {
		u, err := url.Parse(text)
		if err != nil {
			return nil, fmt.Errorf("origin %q: %w", text, err)
		}
		if u.Scheme != "https" || u.Host == "" || origin(u) != text {
			return nil, fmt.Errorf("%q is not an origin (hint: https:// and a host name, nothing else)", text)
		}
		h.targets[text] = u
	}
	for from, to := range opts.Mirrors {
		if h.targets[from] == nil {
			return nil, fmt.Errorf("mirror of %q: %w", from, ErrNotAllowed)
		}
		u, err := url.Parse(to)
		if err != nil {
			return nil, fmt.Errorf("mirror of %q: %w", from, err)
		}
		if _, err := endpoint.Check(to); err != nil {
			return nil, fmt.Errorf("mirror of %q: %w", from, err)
		}
		h.targets[from] = u
	}
	var client http.Client
	if opts.Client != nil {
		client = *opts.Client
	} else {
		t := http.DefaultTransport.(*http.Transport).Clone()
		t.MaxResponseHeaderBytes = 2 * MaxDocument
		client.Transport = t
	}
	client.Jar = nil
	client.CheckRedirect = func(r *http.Request, via []*http.Request) error {
		if origin(r.URL) != origin(via[0].URL) || len(via) > maxRedirects {
			return fmt.Errorf("redirect to %q is not followed", origin(r.URL))
		}
		return nil
	}
	h.client = &client
	return h, nil
}

// Get implements Source.
func (h *HTTP) Get(ctx context.Context, r Request) (Document, error) {
	target, err := h.target(r.URL)
	if err != nil {
		return Document{}, fmt.Errorf("%s: %w", r.Name, err)
	}
	ctx, cancel := context.WithTimeout(ctx, h.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), nil)
	if err != nil {
		return Document{}, fmt.Errorf("%s: %w", r.Name, err)
	}
	for name, values := range h.header {
		req.Header[name] = values
	}
	rsp, err := h.client.Do(req)
	if err != nil {
		return Document{}, unavailable(r, &UnavailableError{Err: err, Silent: true})
	}
	defer rsp.Body.Close()
	switch rsp.StatusCode {
	case http.StatusOK:
	case http.StatusNotFound, http.StatusBadRequest:
		return Document{}, fmt.Errorf("%s from %s: %w: %s", r.Name, target.Host, ErrNotFound, rsp.Status)
	default:
		return Document{}, unavailable(r, &UnavailableError{
			Err: fmt.Errorf("%s says %s", target.Host, rsp.Status), RetryAfter: retryAfter(rsp.Header)})
	}
	body, err := io.ReadAll(io.LimitReader(rsp.Body, MaxDocument+1))
	if err != nil {
		return Document{}, unavailable(r, &UnavailableError{Err: err, Silent: true})
	}
	if len(body) == 0 || len(body) > MaxDocument {
		return Document{}, unavailable(r, &UnavailableError{
			Err: fmt.Errorf("%s sends no document, or one of more than %d bytes", target.Host, MaxDocument)})
	}
	d := Document{Body: body}
	if r.ChainHeader != "" {
		// Intel escapes the PEM of a chain as in a URL.
		chain, err := url.PathUnescape(rsp.Header.Get(r.ChainHeader))
		if err != nil || chain == "" || len(chain) > MaxDocument {
			return Document{}, unavailable(r, &UnavailableError{
				Err: fmt.Errorf("%s sends no issuer chain in its header %s", target.Host, r.ChainHeader)})
		}
		d.Chain = []byte(chain)
	}
	return d, nil
}

// target checks a URL against the list and puts the mirror in.
func (h *HTTP) target(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNotAllowed, err)
	}
	base := h.targets[origin(u)]
	if base == nil || u.User != nil || u.Fragment != "" || strings.Contains(u.Path, "..") {
		return nil, fmt.Errorf("%w: %q (hint: the configuration names the origins of vendors)", ErrNotAllowed, origin(u))
	}
	to := base.JoinPath(u.EscapedPath())
	to.RawQuery = u.RawQuery
	return to, nil
}

func unavailable(r Request, err *UnavailableError) error { return fmt.Errorf("%s: %w", r.Name, err) }

// origin is scheme and host as a configuration names them.
func origin(u *url.URL) string { return u.Scheme + "://" + u.Host }

func retryAfter(h http.Header) time.Duration {
	text := h.Get("Retry-After")
	if s, err := strconv.Atoi(text); err == nil && s > 0 {
		return time.Duration(min(s, 24*3600)) * time.Second
	}
	if at, err := http.ParseTime(text); err == nil {
		// The vendor's own clock is the one that the time is meant by.
		now, err := http.ParseTime(h.Get("Date"))
		if err == nil && at.After(now) {
			return min(at.Sub(now), 24*time.Hour)
		}
	}
	return 0
}
