// Package apiserver runs a real kube-apiserver on the plugin, with a real etcd,
// for tests of what Kubernetes itself makes of it.
package apiserver

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/keyagent/keyagent/test/sim/cluster"
)

// encrypting is a cluster whose secrets the plugin encrypts.
type encrypting struct {
	*cluster.Cluster
	t testing.TB
}

// newCluster makes an API server that encrypts secrets through the plugin at
// socket, in version "v1" or "v2" of its protocol. It is not started.
func newCluster(t testing.TB, socket, version string) *encrypting {
	t.Helper()
	options, args := "", []string{"--allow-privileged=true"} // for the manifests
	if version == "v1" {
		options, args = "\n      cachesize: 100", append(args, "--feature-gates=KMSv1=true")
	}
	return &encrypting{t: t, Cluster: cluster.New(t, cluster.Options{Args: args, Encryption: fmt.Sprintf(`apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms:
      apiVersion: %s
      name: keyagent
      endpoint: unix://%s
      timeout: 3s%s
  - identity: {}
`, version, socket, options)})}
}

const secrets = "/api/v1/namespaces/default/secrets"

// write creates a secret.
func (c *encrypting) write(name, value string) error {
	body := fmt.Sprintf(`{"apiVersion":"v1","kind":"Secret","metadata":{"name":%q},"data":{"value":%q}}`, name, base64.StdEncoding.EncodeToString([]byte(value)))
	status, data, err := c.Request(http.MethodPost, secrets, body)
	if err == nil && status != http.StatusCreated {
		err = fmt.Errorf("%d: %s", status, data)
	}
	return err
}

// read reads a secret.
func (c *encrypting) read(name string) (string, error) {
	status, data, err := c.Request(http.MethodGet, secrets+"/"+name, "")
	if err != nil {
		return "", err
	}
	if status != http.StatusOK {
		return "", fmt.Errorf("%d: %s", status, data)
	}
	var s struct {
		Data struct{ Value []byte }
	}
	err = json.Unmarshal(data, &s)
	return string(s.Data.Value), err
}

// stored is what etcd holds of a secret.
func (c *encrypting) stored(name string) []byte {
	c.t.Helper()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{c.Etcd}, DialTimeout: 10 * time.Second})
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	rsp, err := client.Get(ctx, "/registry/secrets/default/"+name)
	if err == nil && len(rsp.Kvs) != 1 {
		err = errors.New("not there")
	}
	if err != nil {
		c.t.Fatalf("%s in etcd: %v", name, err)
	}
	return rsp.Kvs[0].Value
}
