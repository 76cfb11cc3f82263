// Package etcd is a storage in a cluster of etcd.
//
// Each object of storage is one key. A write is a transaction that compares the
// key's mod_revision, so that any number of key services can share one cluster
// without talking to each other. Reads are linearizable.
//
// A version is the mod_revision and the token of the frame (see framed.Frame),
// and a transaction compares both: a cluster that was restored from a snapshot
// gives out revisions again that it had given out before. By the token a write is
// also known again as ours when the answer to it was lost.
//
// With authentication, the user's role needs the permission readwrite on the
// prefix, or on all keys if there is none. Leases are not used: records stay.
// etcd writes to disk before it answers, unless it was told otherwise.
package etcd

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"

	"github.com/keyagent/keyagent/internal/endpoint"
	"github.com/keyagent/keyagent/storage"
)

// maxAnswer bounds an answer in bytes: a page of a list is the longest.
const maxAnswer = 16 << 20

// Options say where objects are. Endpoints must be set.
type Options struct {
	// Endpoints are the URLs of members of one cluster: all https, or all http
	// on loopback addresses.
	Endpoints []string
	// Prefix is put before each name, with a slash; default none.
	Prefix string
	// TLS says who vouches for the cluster, and may identify us. It is needed
	// with https.
	TLS *tls.Config
	// Username and Password identify us, if they are set. The password is asked
	// for again when the cluster does not accept it any more.
	Username string
	Password func() (string, error)
	// Timeout bounds one call with all its retries; default 30s.
	Timeout time.Duration
}

// Storage keeps objects in a cluster.
type Storage struct {
	opts   Options
	prefix string

	mu       sync.Mutex // never held over a call to the cluster
	client   *clientv3.Client
	password string
	retired  []*clientv3.Client // in use by calls that began before, until Close
}

var (
	_ storage.Storage = (*Storage)(nil)
	_ storage.Deleter = (*Storage)(nil)
	_ storage.Purger  = (*Storage)(nil)
)

// New checks that the cluster can be reached and read.
func New(ctx context.Context, opts Options) (*Storage, error) {
	if err := opts.check(); err != nil {
		return nil, err
	}
	if opts.Timeout == 0 {
		opts.Timeout = 30 * time.Second
	}
	s := &Storage{opts: opts}
	if opts.Prefix != "" {
		s.prefix = opts.Prefix + "/"
	}
	ctx, cancel := context.WithTimeout(ctx, opts.Timeout)
	defer cancel()
	password, err := s.readPassword()
	if err != nil {
		return nil, err
	}
	if s.client, err = s.connect(ctx, password); err != nil {
		return nil, err
	}
	s.password = password
	if _, err := s.List(ctx, "", "", 1); err != nil {
		s.Close()
		return nil, err
	}
	return s, nil
}

func (o *Options) check() error {
	o.Prefix = strings.TrimSuffix(o.Prefix, "/")
	switch {
	case len(o.Endpoints) == 0:
		return errors.New("an endpoint is needed")
	case o.Prefix != "" && storage.CheckName(o.Prefix) != nil:
		return errors.New("the prefix must be made of letters, digits, dots, dashes, underscores and slashes")
	case (o.Username == "") != (o.Password == nil):
		return errors.New("a username and a password go together")
	}
	o.Endpoints = slices.Clone(o.Endpoints) // ours is changed
	plain := 0
	for i, member := range o.Endpoints {
		o.Endpoints[i] = strings.TrimSuffix(member, "/")
		loopback, err := endpoint.Check(member)
		switch {
		case err != nil:
			return err
		case strings.Count(o.Endpoints[i], "/") > 2:
			return errors.New("the endpoint must be of the form https://HOST:PORT")
		case loopback:
			plain++
		}
	}
	switch {
	case plain != 0 && plain != len(o.Endpoints):
		return errors.New("the endpoints must be all https, or all http on loopback addresses")
	case plain == 0 && o.TLS == nil:
		return errors.New("https needs a configuration of TLS")
	case plain != 0 && o.TLS != nil:
		return errors.New("a configuration of TLS needs https")
	}
	return nil
}

func (s *Storage) readPassword() (string, error) {
	if s.opts.Password == nil {
		return "", nil
	}
	password, err := s.opts.Password()
	switch {
	case err != nil:
		return "", fmt.Errorf("%w: %w", storage.ErrCredentials, err)
	case password == "":
		return "", fmt.Errorf("%w: the password is empty", storage.ErrCredentials)
	}
	return password, nil
}

// connect makes a client, which with a password asks for a token.
func (s *Storage) connect(ctx context.Context, password string) (*clientv3.Client, error) {
	config := clientv3.Config{
		Endpoints: s.opts.Endpoints, TLS: s.opts.TLS, Username: s.opts.Username, Password: password,
		DialTimeout: s.opts.Timeout, DialKeepAliveTime: 30 * time.Second, DialKeepAliveTimeout: 10 * time.Second,
		MaxCallRecvMsgSize: maxAnswer,
		Logger:             zap.NewNop(), // errors are returned
		DialOptions:        []grpc.DialOption{grpc.WithChainUnaryInterceptor(keepReason)},
	}
	// The client outlives ctx, which must end the request for a token all the same.
	lifetime, end := context.WithCancel(context.WithoutCancel(ctx))
	stop := context.AfterFunc(ctx, end)
	config.Context = lifetime
	client, err := clientv3.New(config)
	if !stop() && err == nil {
		client.Close()
		err = ctx.Err()
	}
	if err != nil {
		end()
		if ended := ctx.Err(); ended != nil { // the SDK only knows that its own context was cancelled
			err = ended
		}
		return nil, s.explain("connect to", err, nil)
	}
	return client, nil
}

// do calls f with the client, and again with another one if the password was
// changed meanwhile.
func (s *Storage) do(ctx context.Context, what string, f func(context.Context, *clientv3.Client) error) error {
	s.mu.Lock()
	client := s.client
	s.mu.Unlock()
	ctx, why := withReason(ctx)
	err := s.explain(what, f(ctx, client), why)
	if !errors.Is(err, storage.ErrCredentials) || s.opts.Password == nil {
		return err
	}
	password, failed := s.readPassword()
	if failed != nil {
		return failed
	}
	client, failed = s.renew(ctx, client, password)
	switch {
	case failed != nil:
		return failed
	case client == nil:
		return err
	}
	return s.explain(what, f(ctx, client), why)
}

// renew returns a client with that password instead of the one that was refused,
// or nil if the password is still the same.
func (s *Storage) renew(ctx context.Context, refused *clientv3.Client, password string) (*clientv3.Client, error) {
	s.mu.Lock()
	current, same := s.client, s.password == password
	s.mu.Unlock()
	switch {
	case current != refused:
		return current, nil // another call was faster
	case same:
		return nil, nil
	}
	client, err := s.connect(ctx, password)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.retired = append(s.retired, s.client)
	s.client, s.password = client, password
	return client, nil
}

// Close ends the connections, and the calls that are under way.
func (s *Storage) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range append(s.retired, s.client) {
		// What it returns is that its own context has ended.
		_ = c.Close()
	}
	s.retired = nil
	return nil
}
