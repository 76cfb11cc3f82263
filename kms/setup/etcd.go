//go:build !keyagent_noetcd

package setup

import (
	"context"
	"crypto/tls"
	"fmt"
	"strings"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage/etcd"
)

func etcdStorage(ctx context.Context, u *kms.URI) (Objects, error) {
	opts := etcd.Options{Endpoints: list(u, "endpoints"), Prefix: u.Optional("prefix"), Username: u.Optional("username")}
	if len(opts.Endpoints) == 0 {
		return nil, fmt.Errorf("%w: storage://etcd needs the parameter \"endpoints\"", kms.ErrURI)
	}
	var err error
	if opts.Password, err = credential(u, "password"); err != nil {
		return nil, err
	}
	https := strings.HasPrefix(opts.Endpoints[0], "https://")
	if opts.TLS, err = etcdTLS(https, u.Optional("caFile"), u.Optional("certFile"), u.Optional("keyFile")); err != nil {
		return nil, err
	}
	if err := u.Done(); err != nil {
		return nil, err
	}
	return opened[Objects](etcd.New(ctx, opts))
}

// etcdTLS is nil for plain HTTP, which etcd.New allows on loopback alone. The
// client's certificate is read again for each connection.
func etcdTLS(https bool, ca, cert, key string) (*tls.Config, error) {
	switch {
	case !https && ca == "" && cert == "" && key == "":
		return nil, nil
	case (cert == "") != (key == ""):
		return nil, fmt.Errorf("%w: storage://etcd takes the parameters \"certFile\" and \"keyFile\" together", kms.ErrURI)
	}
	pool, err := roots(ca)
	if err != nil {
		return nil, err
	}
	out := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: pool}
	if cert == "" {
		return out, nil
	}
	load := func() (*tls.Certificate, error) {
		if err := config.CheckSecretFile(key); err != nil {
			return nil, fmt.Errorf("etcd client key: %w", err)
		}
		c, err := tls.LoadX509KeyPair(cert, key)
		return &c, err
	}
	if _, err := load(); err != nil {
		return nil, err
	}
	out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return load() }
	return out, nil
}
