// Package localweb is how this program's roles serve metrics and probes over HTTP: on
// this machine alone unless the operator says otherwise, to nobody for long.
package localweb

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"syscall"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

// Listen listens at address, HOST:PORT, which is of the loopback interface unless
// remote says that it may be another one.
func Listen(address string, remote bool) (net.Listener, error) {
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("address of the metrics: %w", err), "127.0.0.1:PORT")
	}
	if !remote && !isLoopback(host) {
		return nil, failure.Newf(failure.Usage, "127.0.0.1:PORT", "the address of the metrics, %q, is not of the loopback interface", address)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		hint := ""
		if errors.Is(err, syscall.EADDRINUSE) {
			hint = "another process has that port; choose another one for the metrics"
		}
		return nil, failure.New(failure.Configuration, fmt.Errorf("metrics: %w", err), hint)
	}
	return l, nil
}

// Local reports whether address is of the loopback interface.
func Local(address string) bool {
	host, _, err := net.SplitHostPort(address)
	return err == nil && isLoopback(host)
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return ip != nil && ip.IsLoopback()
}

// The bounds of one connection and of one request.
const (
	readTimeout  = 10 * time.Second
	writeTimeout = 30 * time.Second
	idleTimeout  = time.Minute
	maxHeader    = 16 << 10
	// maxConns is far above what probes and scrapers have.
	maxConns    = 64
	stopTimeout = 5 * time.Second
)

// Serve answers with h until ctx ends; requests under way are then finished.
func Serve(ctx context.Context, l net.Listener, h http.Handler) error {
	s := &http.Server{
		Handler: h, ReadTimeout: readTimeout, WriteTimeout: writeTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: maxHeader,
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(bounded{l, make(chan struct{}, maxConns)}) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	stopping, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
	defer cancel()
	err := s.Shutdown(stopping)
	if err != nil {
		err = s.Close()
	}
	if served := <-done; !errors.Is(served, http.ErrServerClosed) {
		err = errors.Join(err, served)
	}
	return err
}
