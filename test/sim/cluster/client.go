package cluster

import (
	"crypto/tls"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"
)

const token = "administrator-of-this-test"

// Client is an administrator of a cluster.
type Client struct {
	URL  string // of the API server
	http *http.Client
}

// Connect returns the administrator of the cluster whose API server has a URL.
func Connect(url string) *Client {
	return &Client{URL: url, http: &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{
		// The certificate is one that this server made for itself.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
	}}}
}

// Request asks the API server. A body is JSON or YAML.
func (c *Client) Request(method, path, body string) (int, []byte, error) {
	r, err := http.NewRequest(method, c.URL+path, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	kind := "application/yaml"
	switch {
	case method == http.MethodPatch:
		kind = "application/merge-patch+json"
	case strings.HasPrefix(body, "{"):
		kind = "application/json"
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", kind)
	r.Header.Set("Accept", "application/json")
	rsp, err := c.http.Do(r)
	if err != nil {
		return 0, nil, err
	}
	defer rsp.Body.Close()
	data, err := io.ReadAll(io.LimitReader(rsp.Body, 1<<20))
	return rsp.StatusCode, data, err
}

// Create creates an object, which must succeed, and returns what the API server made
// of it.
func (c *Client) Create(t testing.TB, path, body string) []byte {
	t.Helper()
	return c.want(t, http.StatusCreated, http.MethodPost, path, body)
}

// Patch changes an object, which must succeed.
func (c *Client) Patch(t testing.TB, path, body string) []byte {
	t.Helper()
	return c.want(t, http.StatusOK, http.MethodPatch, path, body)
}

func (c *Client) want(t testing.TB, status int, method, path, body string) []byte {
	t.Helper()
	got, data, err := c.Request(method, path, body)
	if err == nil && got != status {
		err = fmt.Errorf("%d: %s", got, data)
	}
	if err != nil {
		t.Fatalf("%s %s: %v", method, path, err)
	}
	return data
}

// Kubeconfig is what other programs need to be the administrator.
func (c *Client) Kubeconfig() string {
	return fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: test, cluster: {server: %q, insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: %s}}]
contexts: [{name: test, context: {cluster: test, user: admin}}]
current-context: test
`, c.URL, token)
}
