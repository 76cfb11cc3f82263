package azure

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
)

// maxAnswer bounds an answer of the metadata service in bytes.
const maxAnswer = 128 << 10

// imds asks the instance metadata service, which only the host can reach: for
// AMD's certificate of the chip, and for a quote of a TD report. What it says is
// signed by AMD or Intel, and verified by the verifier of the evidence.
type imds struct {
	base   string
	client *http.Client
}

func newIMDS(base string) (*imds, error) {
	if base == "" {
		base = DefaultIMDS
	}
	u, err := url.Parse(base)
	if err != nil || u.Host == "" || u.Scheme != "http" && u.Scheme != "https" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("%w: metadata service %q", ErrConfiguration, base)
	}
	// Without a proxy, which could not reach it, and without redirects.
	transport := &http.Transport{DisableKeepAlives: true}
	return &imds{strings.TrimRight(base, "/"), &http.Client{
		Timeout: requestTimeout, Transport: transport,
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}, nil
}

// certificate returns the VCEK of this machine, and the name of its product line.
func (i *imds) certificate(ctx context.Context) (der []byte, product string, err error) {
	var answer struct{ VcekCert string }
	if err := i.ask(ctx, http.MethodGet, "/metadata/THIM/amd/certification", nil, &answer); err != nil {
		return nil, "", err
	}
	block, _ := pem.Decode([]byte(answer.VcekCert))
	if block == nil {
		return nil, "", errors.New("metadata service: no certificate in the answer")
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, "", fmt.Errorf("metadata service: %w", err)
	}
	return block.Bytes, strings.TrimPrefix(cert.Issuer.CommonName, "SEV-"), nil
}

// quote has the host's quoting enclave sign a TD report.
func (i *imds) quote(ctx context.Context, report []byte) ([]byte, error) {
	body, err := json.Marshal(map[string]string{"report": base64.RawURLEncoding.EncodeToString(report)})
	if err != nil {
		return nil, err
	}
	var answer struct{ Quote string }
	if err := i.ask(ctx, http.MethodPost, "/acc/tdquote", body, &answer); err != nil {
		return nil, err
	}
	quote, err := base64.RawURLEncoding.DecodeString(strings.TrimRight(answer.Quote, "="))
	if err != nil || len(quote) == 0 {
		return nil, errors.New("metadata service: no quote in the answer")
	}
	return quote, nil
}

func (i *imds) ask(ctx context.Context, method, path string, body []byte, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	r, err := http.NewRequestWithContext(ctx, method, i.base+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	// The service answers only requests that nobody is tricked into.
	r.Header.Set("Metadata", "true")
	if body != nil {
		r.Header.Set("Content-Type", "application/json")
	}
	rsp, err := i.client.Do(r)
	if err != nil {
		return fmt.Errorf("metadata service: %w", err)
	}
	defer rsp.Body.Close()
	if rsp.StatusCode != http.StatusOK {
		return fmt.Errorf("metadata service: %s: %s", path, rsp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(rsp.Body, maxAnswer+1))
	if err != nil {
		return fmt.Errorf("metadata service: %w", err)
	}
	if len(data) > maxAnswer {
		return fmt.Errorf("metadata service: %s: more than %d bytes", path, maxAnswer)
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("metadata service: %s: %w", path, err)
	}
	return nil
}
