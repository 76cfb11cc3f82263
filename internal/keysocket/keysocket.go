// Package keysocket gives keys to systemd-cryptsetup and to services that load a
// credential from a socket, as crypttab(5) and systemd.exec(5) describe: the caller
// connects from an abstract name that says what it wants, and reads until the end. What
// it gets is the key, byte for byte, or nothing at all.
//
// Anybody may bind an abstract name, so that the name is never believed by itself. A
// caller is given the key of a volume only if
//
//   - the kernel says that it is root,
//   - it is in the user, pid and, for systemd-cryptsetup, mount namespace of this process,
//   - its control group is the very one of a unit,
//   - it holds the socket that calls itself by that name, so that its process number was
//     not another one's a moment ago, and
//   - a rule names the unit, and what the name asks for.
//
// A refusal is a line in the log, and an end without a byte for the caller. The package
// holds no keys and knows no volumes.
package keysocket

import (
	"context"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/internal/unixsocket"
)

// Rule allows one unit one key. What no rule allows is refused.
type Rule struct {
	Volume string // ID
	Unit   string // exact name
	// Mapping is the name of the volume's mapping, for systemd-cryptsetup.
	Mapping string
	// Credential is the ID in the unit's LoadCredential=. It is empty where the unit
	// runs systemd-cryptsetup.
	Credential string
}

// Volumes are where keys come from.
type Volumes interface {
	// HandOut calls give with the key of a volume, at most once, and returns when the
	// volume is mapped or did not come to be. gone is closed when the caller that would
	// map it has ended; nil if somebody else maps it. ctx ends when the caller is gone
	// before it was given anything. What goes wrong is the volumes' to log.
	HandOut(ctx context.Context, volume string, give func(key []byte) error, gone <-chan struct{}) error
}

// The bounds.
const (
	maxConnections = 64
	writeWithin    = 10 * time.Second
	acceptPause    = time.Second
	// A refused caller may try again at once, and often.
	linesBurst = 20
	linesEvery = 3 * time.Second
)

// Server answers calls.
type Server struct {
	Rules   []Rule
	Volumes Volumes
	Log     *slog.Logger

	lines lines
}

// Serve answers on all listeners until ctx ends, and closes them.
func (s *Server) Serve(ctx context.Context, listeners []*net.UnixListener) error {
	group, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		bounded := unixsocket.Bounded(l, maxConnections, maxConnections)
		group.Go(func() error { <-ctx.Done(); return l.Close() })
		group.Go(func() error {
			for {
				c, err := bounded.Accept()
				if ctx.Err() != nil {
					return nil
				}
				if err != nil {
					// Such as for want of descriptors: volumes that are open go on.
					s.Log.Error("could not accept a call on the key socket", "error", err)
					select {
					case <-ctx.Done():
					case <-time.After(acceptPause):
					}
					continue
				}
				group.Go(func() error { s.answer(ctx, c); return nil })
			}
		})
	}
	return group.Wait()
}

// answer gives one caller the key, or nothing.
func (s *Server) answer(ctx context.Context, conn net.Conn) {
	defer conn.Close()
	p, err := callerOf(conn)
	if err != nil {
		s.refused(p, err)
		return
	}
	defer p.close()
	rule, err := s.admit(p)
	if err != nil {
		s.refused(p, err)
		return
	}
	s.Log.Info("a unit asks for a key", "volume", rule.Volume, "unit", rule.Unit, "pid", p.pid)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var given atomic.Bool
	ended := make(chan struct{})
	waited := make(chan struct{})
	go func() {
		defer close(waited)
		if p.wait(ctx) {
			close(ended)
			if !given.Load() {
				cancel() // nobody is left who could use the key
			}
		}
	}()
	gone := ended
	if rule.Credential != "" {
		gone = nil // systemd reads for the service, which starts afterwards
	}
	// How it went is in the log already.
	_ = s.Volumes.HandOut(ctx, rule.Volume, func(key []byte) error {
		if err := conn.SetWriteDeadline(time.Now().Add(writeWithin)); err != nil {
			return err
		}
		given.Store(true)
		_, err := conn.Write(key)
		_ = conn.Close() // the caller reads to the end
		return err
	}, gone)
	cancel()
	<-waited
}

// refused says why, for people and not for the caller.
func (s *Server) refused(p *caller, why error) {
	if withheld, ok := s.lines.allow(time.Now()); ok {
		s.Log.Warn("refused to give a key", "error", why, "pid", p.pid, "uid", p.uid, "unit", p.unit, "asks_as", p.name.String(), "lines_withheld", withheld)
	}
}
