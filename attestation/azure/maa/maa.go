// Package maa gets tokens of Microsoft Attestation for a confidential VM of Azure.
//
// The provider is told everything that the VM's hardware and vTPM say, and encrypts
// its token to a key that the vTPM made and certified: only the VM that was quoted, in
// the state that was quoted, can read it. Tokens are verified by package azure, without
// this package.
//
// Requests and answers are those of Microsoft's own client, libazguestattestation in
// Azure/confidential-computing-cvm-guest-attestation, for the provider's path
// /attest/AzureGuest, version 2020-10-01.
package maa

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/azure"
	"github.com/keyagent/keyagent/attestation/tpm"
)

// ErrHardware means that this client knows VMs on SEV-SNP alone.
var ErrHardware = errors.New("tokens of Microsoft Attestation are for VMs on SEV-SNP alone")

const (
	// requestTimeout bounds one request.
	requestTimeout = 30 * time.Second
	// maxAnswer bounds an answer in bytes, and maxExcerpt what an error shows of one.
	maxAnswer  = 256 << 10
	maxExcerpt = 200
)

// Options of [New]. Unset fields take the stated default.
type Options struct {
	// URL is the attestation provider's address, https. Required.
	URL string
	// Device is passed to tpm.OpenDevice. Default tpm.DefaultDevice.
	Device string
	// EventLog is the path of the event log. Default tpm.DefaultEventLog.
	EventLog string
	// IMDS is the address of the host's metadata service. Default azure.DefaultIMDS.
	IMDS string
	// Client sends the request to the provider. Default one with a deadline for each
	// request, which follows no redirects.
	Client *http.Client
}

// client is one provider's.
type client struct {
	opts Options
	host *http.Client // for the metadata service
}

// New returns what gets a token over a nonce, for azure.IssuerOptions.
func New(opts Options) (func(ctx context.Context, nonce []byte) (string, error), error) {
	u, err := url.Parse(opts.URL)
	if err != nil || u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" {
		return nil, fmt.Errorf("attestation provider %q is not an https address", opts.URL)
	}
	opts.URL = strings.TrimRight(opts.URL, "/")
	opts.IMDS = strings.TrimRight(opts.IMDS, "/")
	for unset, value := range map[*string]string{&opts.Device: tpm.DefaultDevice, &opts.EventLog: tpm.DefaultEventLog, &opts.IMDS: azure.DefaultIMDS} {
		if *unset == "" {
			*unset = value
		}
	}
	here := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	if opts.Client == nil {
		opts.Client = &http.Client{Timeout: requestTimeout, CheckRedirect: here}
	}
	// The metadata service is the host's own: no proxy reaches it.
	host := &http.Client{Timeout: requestTimeout, CheckRedirect: here, Transport: &http.Transport{DisableKeepAlives: true}}
	return (&client{opts, host}).token, nil
}

// token asks for a token over a nonce.
func (c *client) token(ctx context.Context, nonce []byte) (string, error) {
	certificates, err := c.certificates(ctx)
	if err != nil {
		return "", fmt.Errorf("certificates of the chip: %w", err)
	}
	report, err := c.report()
	if err != nil {
		return "", err
	}
	certificate, err := c.readNV(nvAKCertificate, "certificate of the attestation key")
	if err != nil {
		return "", err
	}
	log, err := readLog(c.opts.EventLog)
	if err != nil {
		return "", err
	}
	t, err := tpm.OpenDevice(c.opts.Device)
	if err != nil {
		return "", err
	}
	// The TPM is open until the token is decrypted: the key lives as long.
	defer t.Close()
	s, err := state(t, nonce)
	if err != nil {
		return "", err
	}
	key, err := newTransportKey(t, s)
	if err != nil {
		return "", err
	}
	defer key.flush()
	body, err := request{
		nonce: nonce, report: report, chip: certificates, ak: certificate, log: log, state: s, key: key,
	}.marshal()
	if err != nil {
		return "", err
	}
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, c.opts.URL+"/attest/AzureGuest?api-version=2020-10-01", bytes.NewReader(body))
	if err != nil {
		return "", err
	}
	r.Header.Set("Content-Type", "application/json")
	data, err := ask(c.opts.Client, r)
	if err != nil {
		return "", fmt.Errorf("attestation provider: %w", err)
	}
	answer, err := parseAnswer(data)
	if err != nil {
		return "", fmt.Errorf("attestation provider: %w", err)
	}
	inner, err := key.decrypt(answer.EncryptedInnerKey)
	if err != nil {
		return "", fmt.Errorf("key of the token: %w", err)
	}
	return answer.open(inner)
}

// report reads what the HCL left in NV memory.
func (c *client) report() (*azure.Report, error) {
	raw, err := c.readNV(azure.NVReport, "report of Azure's")
	if err != nil {
		return nil, err
	}
	r, err := azure.Parse(raw)
	if err != nil {
		return nil, fmt.Errorf("the machine's own report: %v", err) // which is no refusal
	}
	if r.Isolation != attestation.SNP {
		return nil, fmt.Errorf("%w: below this one is %s", ErrHardware, r.Isolation)
	}
	return r, nil
}

func (c *client) readNV(index uint32, what string) ([]byte, error) {
	data, err := tpm.Platform{Device: c.opts.Device}.ReadNV(index)
	if err == nil && data == nil {
		err = fmt.Errorf("%w: the TPM has no %s at NV index %#x", attestation.ErrNoDevice, what, index)
	}
	return data, err
}

// certificates returns the chip's certificate and its makers', in PEM, as the host has
// them.
func (c *client) certificates(ctx context.Context) ([]byte, error) {
	r, err := http.NewRequestWithContext(ctx, http.MethodGet, c.opts.IMDS+"/metadata/THIM/amd/certification", http.NoBody)
	if err != nil {
		return nil, err
	}
	// The service answers only requests that no page can have a browser send.
	r.Header.Set("Metadata", "true")
	data, err := ask(c.host, r)
	if err != nil {
		return nil, err
	}
	return parseCertificates(data)
}

// ask returns the body of a successful answer.
func ask(client *http.Client, r *http.Request) ([]byte, error) {
	rsp, err := client.Do(r)
	if err != nil {
		return nil, err
	}
	defer rsp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(rsp.Body, maxAnswer+1))
	switch {
	case err != nil:
		return nil, err
	case len(data) > maxAnswer:
		return nil, fmt.Errorf("an answer of more than %d bytes", maxAnswer)
	case rsp.StatusCode != http.StatusOK:
		return nil, fmt.Errorf("%s: %q", rsp.Status, data[:min(len(data), maxExcerpt)])
	}
	return data, nil
}
