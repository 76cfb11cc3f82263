package demo

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/keyagent/keyagent/internal/lab/pki"
)

// Service is a key service of the demo: the real command, in a process of its
// own, with a certificate authority and a master secret made for it.
type Service struct {
	Dir     string
	Program string // the keyagent that runs
	Address string // after Start

	cmd    *exec.Cmd
	done   chan error
	mu     sync.Mutex
	lines  []string
	change chan struct{} // closed and replaced at each line
}

// NewService makes everything that the service needs but its policy.
func NewService(dir, program string) (*Service, error) {
	s := &Service{Dir: dir, Program: program, change: make(chan struct{})}
	ca, err := pki.NewAuthority()
	if err != nil {
		return nil, err
	}
	cert, err := ca.Server("keyservice.demo")
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	if err := ca.Write(dir, cert); err != nil {
		return nil, err
	}
	config := `listen: 127.0.0.1:0
tls: {certificate: server.pem, key: server.key}
policy: policy.yaml
kms: kms://cluster-kms?file=master.secret
storage: storage://file?dir=records
audit: audit.log
admin: admin.sock
`
	return s, os.WriteFile(s.path("serve.yaml"), []byte(config), 0o600)
}

func (s *Service) path(name string) string { return filepath.Join(s.Dir, name) }

// CA is the certificate that agents trust.
func (s *Service) CA() string { return s.path("ca.pem") }

// AuditLog is the service's audit log.
func (s *Service) AuditLog() string { return s.path("audit.log") }

// MasterSecret is the service's KEK.
func (s *Service) MasterSecret() string { return s.path("master.secret") }

// WritePolicy writes the policy: who makes TPMs, the profile as keyagent measure
// printed it, and one grant for the volume "data".
func (s *Service) WritePolicy(tpmRoot string, profile []byte) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, `version: 2
lifetime: 1h
trust:
  tpm:
    roots:
      - {name: demo, file: %s}
grants:
  - name: guest-data
    profiles: [guest]
    volumes: ["data", "data-*"]
    operations: [open, format]
profiles:
%s...
`, tpmRoot, indent(profile))
	return os.WriteFile(s.path("policy.yaml"), b.Bytes(), 0o644)
}

func indent(text []byte) string {
	var b strings.Builder
	for line := range strings.Lines(string(text)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		b.WriteString("  " + line)
	}
	return b.String()
}

// Run runs a keyagent command to its end and returns its standard output.
func (s *Service) Run(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, s.Program, args...)
	cmd.Dir = s.Dir
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("keyagent %s: %w: %s", args[0], err, strings.TrimSpace(stderr.String()))
	}
	return out, nil
}

// Start starts the service and waits until it listens.
func (s *Service) Start(ctx context.Context) error {
	s.cmd = exec.CommandContext(ctx, s.Program, "serve", "--config", "serve.yaml", "--init-master-secret", "--log-format", "json")
	s.cmd.Dir = s.Dir
	s.cmd.Cancel = func() error { return s.cmd.Process.Signal(os.Interrupt) }
	s.cmd.WaitDelay = 15 * time.Second
	stderr, err := s.cmd.StderrPipe()
	if err != nil {
		return err
	}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	s.done = make(chan error, 1)
	go func() {
		scan := bufio.NewScanner(stderr)
		scan.Buffer(nil, 4<<20)
		for scan.Scan() {
			s.add(scan.Text())
		}
		s.done <- s.cmd.Wait()
	}()
	line, err := s.Await(ctx, "serving", "", 30*time.Second)
	if err != nil {
		return err
	}
	s.Address, _ = line["address"].(string)
	return nil
}

func (s *Service) add(line string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, line)
	close(s.change)
	s.change = make(chan struct{})
}

// Log returns what the service has logged so far.
func (s *Service) Log() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.lines...)
}

// Await returns the first log entry with that message which contains text.
func (s *Service) Await(ctx context.Context, message, text string, limit time.Duration) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	seen := 0
	for {
		s.mu.Lock()
		lines, change := s.lines[seen:], s.change
		seen = len(s.lines)
		s.mu.Unlock()
		for _, l := range lines {
			var entry map[string]any
			if json.Unmarshal([]byte(l), &entry) == nil && entry["msg"] == message && strings.Contains(l, text) {
				return entry, nil
			}
		}
		select {
		case <-change:
		case err := <-s.done:
			s.done <- err
			return nil, fmt.Errorf("the key service ended: %w: %s", err, strings.Join(s.Log(), "\n"))
		case <-ctx.Done():
			return nil, fmt.Errorf("the key service did not log %q: %w", message, ctx.Err())
		}
	}
}

// Stop ends the service and waits for it.
func (s *Service) Stop() error {
	if s.cmd == nil || s.cmd.Process == nil {
		return nil
	}
	_ = s.cmd.Process.Signal(os.Interrupt)
	err := <-s.done
	s.done <- err
	var exit *exec.ExitError
	if errors.As(err, &exit) && !exit.Exited() {
		return nil // the context killed it
	}
	return err
}
