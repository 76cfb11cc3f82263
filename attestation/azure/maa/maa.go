// Package maa gets tokens of Microsoft Attestation for a confidential VM of Azure.
//
// It is apart from package azure because it alone needs a library with a second
// TPM stack. A program that is built with the tag keyagent_nomaa has a stub in its
// place, whose [New] explains itself. Tokens are verified by package azure, without
// this package.
package maa

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"time"
)

// ErrUnsupported means that this program was built without the library.
var ErrUnsupported = errors.New("this program was built without Microsoft Attestation (hint: build it without the tag keyagent_nomaa)")

// requestTimeout bounds one request.
const requestTimeout = 30 * time.Second

// Options of [New].
type Options struct {
	// URL is the attestation provider's address, https. Required.
	URL string
	// Client sends the requests, to the provider and to the host's metadata
	// service. Default one with a deadline for each request.
	Client *http.Client
}

// New returns what gets a token over a nonce, for azure.IssuerOptions. It uses the
// machine's own TPM. Only VMs on SEV-SNP are known to the library.
func New(opts Options) (func(ctx context.Context, nonce []byte) (string, error), error) {
	u, err := url.Parse(opts.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("attestation provider %q is not an https address", opts.URL)
	}
	if opts.Client == nil {
		opts.Client = &http.Client{Timeout: requestTimeout}
	}
	return newAttester(opts)
}
