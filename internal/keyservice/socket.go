package keyservice

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/revocation"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// The admin socket speaks HTTP with JSON: POST /v1/VERB. It is for this program's own
// commands, of the same version, and no interface for others.

// maxAdminRequest bounds a request in bytes.
const maxAdminRequest = 1 << 20

// adminRequest is what each verb may be asked with.
type adminRequest struct {
	Volume    string `json:"volume,omitempty"`
	After     string `json:"after,omitempty"`
	Lost      *Lost  `json:"lost,omitempty"`
	Recipient []byte `json:"recipient,omitempty"`
	EveryS    int64  `json:"every_s,omitempty"`
	Force     bool   `json:"force,omitempty"`

	Subject *revocation.Subject `json:"subject,omitempty"`
	Reason  string              `json:"reason,omitempty"`

	To        string   `json:"to,omitempty"`
	Version   uint32   `json:"version,omitempty"`
	WindowS   int64    `json:"window_s,omitempty"`
	Request   []byte   `json:"request,omitempty"`
	Approvals [][]byte `json:"approvals,omitempty"`
}

// adminError is an error on the socket.
type adminError struct {
	Class         failure.Class `json:"class"`
	Message       string        `json:"message"`
	Hint          string        `json:"hint,omitempty"`
	CorrelationID string        `json:"correlation_id,omitempty"`
}

func (s *Server) openAdmin() error {
	if s.cfg.Admin == "" {
		return nil
	}
	l, err := unixsocket.Listen(s.cfg.Admin, unixsocket.Options{Mode: 0o600, UID: -1, GID: -1})
	if err != nil {
		return failure.New(failure.Configuration, fmt.Errorf("admin socket: %w", err), "")
	}
	s.admin = &admitted{l}
	s.closers = append(s.closers, ignoreClosed{s.admin})
	return nil
}

// admitted accepts root and the service's own user, by the kernel's word.
type admitted struct{ net.Listener }

// operatorConn knows who called.
type operatorConn struct {
	net.Conn
	uid uint32
}

func (a *admitted) Accept() (net.Conn, error) {
	admit := unixsocket.Credentials(func(p unixsocket.Peer) error {
		if p.UID != 0 && int(p.UID) != os.Geteuid() {
			return fmt.Errorf("uid %d is neither root nor the key service", p.UID)
		}
		return nil
	})
	for {
		c, err := a.Listener.Accept()
		if err != nil {
			return nil, err
		}
		admittedConn, info, err := admit.ServerHandshake(c)
		if err != nil {
			_ = c.Close()
			continue
		}
		return operatorConn{admittedConn, info.(unixsocket.Peer).UID}, nil
	}
}

type whoKey struct{}

func (s *Server) serveAdmin(ctx context.Context, group *errgroup.Group) {
	server := &http.Server{
		Handler: s.service.adminHandler(), ReadTimeout: 10 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 8 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, whoKey{}, fmt.Sprintf("uid:%d", c.(operatorConn).uid))
		},
	}
	group.Go(func() error {
		if err := server.Serve(s.admin); !errors.Is(err, http.ErrServerClosed) {
			return err
		}
		return nil
	})
	group.Go(func() error { <-ctx.Done(); return server.Close() })
}

func (s *Service) adminHandler() http.Handler {
	mux := http.NewServeMux()
	for verb, f := range map[string]func(ctx context.Context, who string, r adminRequest) (any, error){
		"status": func(ctx context.Context, _ string, _ adminRequest) (any, error) { return s.Admin().Status(ctx) },
		"rewrap": func(ctx context.Context, _ string, _ adminRequest) (any, error) {
			defer s.forget.used()
			return s.Admin().Rewrap(ctx, nil)
		},
		"checkpoint": func(context.Context, string, adminRequest) (any, error) { return s.Checkpoint() },
		"list":       func(ctx context.Context, _ string, r adminRequest) (any, error) { return s.Volumes(ctx, r.After, 100) },
		"show":       func(ctx context.Context, _ string, r adminRequest) (any, error) { return s.Volume(ctx, r.Volume) },
		"retire": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.Retire(ctx, who, r.Volume)
		},
		"reset": func(ctx context.Context, who string, r adminRequest) (any, error) { return s.Reset(ctx, who, r.Volume) },
		"takeover": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.Takeover(ctx, who, r.Volume)
		},
		"rotate": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.AskRotation(ctx, who, r.Volume, time.Duration(r.EveryS)*time.Second)
		},
		"abandon-rotation": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.AbandonRotation(ctx, who, r.Volume, r.Force)
		},
		"revoke": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.revoke(ctx, who, r, false)
		},
		"lift":        func(ctx context.Context, who string, r adminRequest) (any, error) { return s.revoke(ctx, who, r, true) },
		"revocations": func(ctx context.Context, _ string, _ adminRequest) (any, error) { return s.Revocations(ctx) },
		"recover-request": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.RecoverRequest(ctx, who, r.Volume, r.Reason, r.To, r.Version, time.Duration(r.WindowS)*time.Second)
		},
		"recover": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.Recover(ctx, who, r.Request, r.Approvals)
		},
		"restored": func(ctx context.Context, _ string, _ adminRequest) (any, error) { return s.Restored(ctx) },
		"accept-restore": func(ctx context.Context, who string, r adminRequest) (any, error) {
			return s.AcceptRestore(ctx, who, r.Volume)
		},
		"import": func(ctx context.Context, who string, r adminRequest) (any, error) {
			if r.Lost == nil {
				return nil, failure.Newf(failure.Usage, "", "nothing is known of the volume")
			}
			return s.ImportLost(ctx, who, *r.Lost)
		},
	} {
		mux.HandleFunc("POST /v1/"+verb, func(w http.ResponseWriter, req *http.Request) {
			var in adminRequest
			if err := readAdmin(req, &in); err != nil {
				writeAdminError(w, err)
				return
			}
			who, _ := req.Context().Value(whoKey{}).(string)
			out, err := f(req.Context(), who, in)
			var done any = out
			if p, ok := out.(macstore.Progress); ok && err != nil {
				err = fmt.Errorf("after %d of %d records, and run again it goes on where it was: %w", p.Done, p.Total, err)
			}
			if err != nil {
				writeAdminError(w, err)
				return
			}
			_ = json.NewEncoder(w).Encode(done)
		})
	}
	mux.HandleFunc("POST /v1/export", s.serveExport)
	return mux
}

// exported ends the body of an export, which has no other place for it.
const (
	trailerDigest  = "Keyagent-Digest"
	trailerRecords = "Keyagent-Progress"
	trailerError   = "Keyagent-Error"
)

func (s *Service) revoke(ctx context.Context, who string, r adminRequest, lift bool) (any, error) {
	if r.Subject == nil {
		return nil, failure.Newf(failure.Usage, "", "nobody is named")
	}
	return s.Revoke(ctx, who, *r.Subject, r.Reason, lift)
}

func (s *Service) serveExport(w http.ResponseWriter, req *http.Request) {
	var in adminRequest
	if err := readAdmin(req, &in); err != nil {
		writeAdminError(w, err)
		return
	}
	defer s.forget.used()
	who, _ := req.Context().Value(whoKey{}).(string)
	if err := s.audit.Append(audit.Entry{Event: "export", CorrelationID: newID(), Identity: who, Result: "allowed", Detail: "to recipient " + RecipientDigest(in.Recipient)}); err != nil {
		writeAdminError(w, err)
		return
	}
	w.Header().Set("Trailer", trailerDigest+", "+trailerRecords+", "+trailerError)
	w.WriteHeader(http.StatusOK)
	digest, p, err := s.Admin().Export(req.Context(), w, in.Recipient, nil)
	w.Header().Set(trailerDigest, digest)
	if text, jsonErr := json.Marshal(p); jsonErr == nil {
		w.Header().Set(trailerRecords, string(text))
	}
	if err != nil {
		text, _ := json.Marshal(errorOnSocket(err))
		w.Header().Set(trailerError, string(text))
	}
}

func readAdmin(req *http.Request, in *adminRequest) error {
	d := json.NewDecoder(io.LimitReader(req.Body, maxAdminRequest))
	d.DisallowUnknownFields()
	if err := d.Decode(in); err != nil {
		return failure.New(failure.Usage, fmt.Errorf("request: %w", err), "is this keyagent of the same version as the service?")
	}
	return nil
}

func errorOnSocket(err error) adminError {
	f := failure.Of(err)
	return adminError{f.Class, err.Error(), f.Hint, f.CorrelationID}
}

func writeAdminError(w http.ResponseWriter, err error) {
	w.WriteHeader(http.StatusConflict)
	_ = json.NewEncoder(w).Encode(errorOnSocket(err))
}
