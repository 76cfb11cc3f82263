package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

func newKMS(t *testing.T, command string) *KMS {
	t.Helper()
	k, err := New(t.Context(), Options{Command: command})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func TestConformance(t *testing.T) {
	kmstest.Run(t, kmstest.Bed{
		Open:  func(t *testing.T) kms.KMS { return newKMS(t, "printf 0123456789abcdef0123456789abcdef") },
		Other: func(t *testing.T) kms.KMS { return newKMS(t, "printf fedcba9876543210fedcba9876543210") },
	})
}

// TestWhatACommandPrints is part of case 44.
func TestWhatACommandPrints(t *testing.T) {
	for _, tt := range []struct {
		name     string
		command  string
		encoding Encoding
		want     string // empty: refused
	}{
		{"16 raw bytes", "printf 0123456789abcdef", Raw, "0123456789abcdef"},
		{"24 raw bytes", "printf 0123456789abcdef01234567", Raw, "0123456789abcdef01234567"},
		{"a raw key and a newline", "echo 0123456789abcdef", Raw, "0123456789abcdef"},
		{"a raw key that ends with a newline of its own", `printf '0123456789abcde\n'`, Raw, "0123456789abcde\n"},
		{"two newlines", `printf '0123456789abcdef\n\n'`, Raw, ""},
		{"a key with NUL bytes", `printf '\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0'`, Raw, strings.Repeat("\x00", 16)},
		{"nothing", "true", Raw, ""},
		{"a newline alone", "echo", Raw, ""},
		{"15 bytes", "printf 0123456789abcde", Raw, ""},
		{"33 bytes", "printf 0123456789abcdef0123456789abcdef0", Raw, ""},
		{"without end", "yes", Raw, ""},
		{"a key and a failure", "printf 0123456789abcdef; exit 3", Raw, ""},
		{"hex", "echo 30313233343536373839616263646566", Hex, "0123456789abcdef"},
		{"hex with a letter too many", "echo 30313233343536373839616263646566f", Hex, ""},
		{"hex that is not", "echo 3031323334353637383961626364656g", Hex, ""},
		{"base64", "echo MDEyMzQ1Njc4OWFiY2RlZg==", Base64, "0123456789abcdef"},
		{"base64 without padding", "echo MDEyMzQ1Njc4OWFiY2RlZg", Base64, ""},
		{"no such command", "/no/such/command", Raw, ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s, err := NewSource(Options{Command: tt.command, Encoding: tt.encoding})
			if err != nil {
				t.Fatal(err)
			}
			kek, err := s.Fetch(t.Context())
			if tt.want == "" {
				if !errors.Is(err, ErrCommand) || !errors.Is(err, kms.ErrUnavailable) {
					t.Fatalf("got %v", err)
				}
				if strings.Contains(err.Error(), "0123") || strings.Contains(err.Error(), "3031") {
					t.Fatalf("the error shows what was printed: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer kek.Close()
			_ = kek.Use(func(b []byte) error {
				if string(b) != tt.want {
					t.Errorf("got %q", b)
				}
				return nil
			})
		})
	}
}

func TestACommandThatHangsIsKilledWithItsChildren(t *testing.T) {
	dir := t.TempDir()
	pid := filepath.Join(dir, "pid")
	s, err := NewSource(Options{Command: fmt.Sprintf("sleep 1000 & echo $! >%s; wait", pid), Deadline: 3 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fetch(t.Context()); !errors.Is(err, ErrCommand) || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("got %v", err)
	}
	child, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	// It was sent its signal; a machine that is busy lets it die a little later.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		status, err := os.ReadFile("/proc/" + strings.TrimSpace(string(child)) + "/status")
		if err != nil || strings.Contains(string(status), "State:\tZ") {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the command's child still runs: %s", status)
		}
	}
}

func TestAChildThatLeftTheGroupHoldsNobodyUp(t *testing.T) {
	pid := filepath.Join(t.TempDir(), "pid")
	s, err := NewSource(Options{Command: fmt.Sprintf("setsid sh -c 'echo $$ >%s; exec sleep 1000' & wait", pid), Deadline: 3 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fetch(t.Context()); !errors.Is(err, ErrCommand) {
		t.Fatalf("got %v", err)
	}
	// It is still there, and Fetch came back all the same.
	var child int
	data, err := os.ReadFile(pid)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(string(data), &child); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(child, syscall.SIGKILL); err != nil {
		t.Errorf("the child was gone: %v", err)
	}
}

func TestStandardErrorIsLogged(t *testing.T) {
	var log bytes.Buffer
	s, err := NewSource(Options{Command: "echo trouble >&2; exit 1", Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Fetch(t.Context()); !errors.Is(err, ErrCommand) {
		t.Fatal(err)
	}
	if !strings.Contains(log.String(), "trouble") {
		t.Fatalf("logged: %s", log.String())
	}
}

func TestAnOldKEKIsFetchedAgainAndNotUsedIfThatFails(t *testing.T) {
	file := filepath.Join(t.TempDir(), "kek")
	write := func(s string) {
		if err := os.WriteFile(file, []byte(s), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("0123456789abcdef")
	now := time.Now()
	k, err := New(t.Context(), Options{Command: "cat " + file, Cache: time.Minute, Now: func() time.Time { return now }})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	b := kms.Binding{VolumeID: "data", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	key, w, err := k.Generate(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Close()
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Unwrap(t.Context(), b, w); err != nil {
		t.Fatalf("within the cache's time: %v", err)
	}
	now = now.Add(time.Minute)
	if _, err := k.Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrUnavailable) {
		t.Fatalf("after it: %v", err)
	}
	write("another KEK, 16b")
	if _, err := k.Unwrap(t.Context(), b, w); !errors.Is(err, kms.ErrKEKVersion) {
		t.Fatalf("under another KEK: %v", err)
	}
	write("0123456789abcdef")
	now = now.Add(foreignFor)
	again, err := k.Unwrap(t.Context(), b, w)
	if err != nil || !again.Equal(key) {
		t.Fatalf("after the KEK came back: %v", err)
	}
}

func TestOptionsThatMeanNothingAreRefused(t *testing.T) {
	for _, o := range []Options{{}, {Command: "true", Encoding: "rot13"}} {
		if _, err := NewSource(o); err == nil {
			t.Errorf("%+v was accepted", o)
		}
	}
}

func FuzzOutput(f *testing.F) {
	for _, e := range []Encoding{Raw, Hex, Base64} {
		f.Add(string(e), []byte("0123456789abcdef\n"))
		f.Add(string(e), []byte("30313233343536373839616263646566\n"))
		f.Add(string(e), []byte("MDEyMzQ1Njc4OWFiY2RlZg==\n"))
	}
	f.Fuzz(func(t *testing.T, encoding string, out []byte) {
		if len(out) == 0 || len(out) > maxOutput {
			return
		}
		s, err := NewSource(Options{Command: "true", Encoding: Encoding(encoding)})
		if err != nil {
			return
		}
		p, err := secret.From(bytes.Clone(out))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		kek, err := s.decode(p)
		if err == nil && !validLength(kek.Len()) {
			t.Fatalf("a key of %d bytes", kek.Len())
		}
		kek.Close()
	})
}

// A key under another KEK runs the command once, and holds up nobody whose KEK is
// here; where the command fails, it is still not ours, so that others are asked.
func TestAForeignKEKHoldsNobodyUp(t *testing.T) {
	dir := t.TempDir()
	runs, slow := filepath.Join(dir, "runs"), filepath.Join(dir, "slow")
	now := time.Now()
	k, err := New(t.Context(), Options{
		Command: fmt.Sprintf("echo >>%s; if [ -e %s ]; then while [ -e %s ]; do sleep 0.01; done; exit 1; fi; printf 0123456789abcdef", runs, slow, slow),
		Now:     func() time.Time { return now },
	})
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	b := kms.Binding{VolumeID: "data", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	_, w, err := k.Generate(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	foreign := w
	foreign.KEK = "command:0000000000000000"
	for range 20 {
		if _, err := k.Unwrap(t.Context(), b, foreign); !errors.Is(err, kms.ErrKEKVersion) {
			t.Fatal(err)
		}
	}
	if text, _ := os.ReadFile(runs); len(text) != 2 {
		t.Errorf("the command was run %d times", len(text))
	}
	if err := os.WriteFile(slow, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign.KEK = "command:1111111111111111"
	failed := make(chan error, 1)
	go func() { _, err := k.Unwrap(t.Context(), b, foreign); failed <- err }()
	for { // until the command runs
		if text, _ := os.ReadFile(runs); len(text) == 3 {
			break
		}
	}
	if _, err := k.Unwrap(t.Context(), b, w); err != nil {
		t.Errorf("a key whose KEK is here: %v", err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	other := foreign
	other.KEK = "command:2222222222222222"
	if _, err := k.Unwrap(ctx, b, other); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a caller who does not wait: %v", err)
	}
	if err := os.Remove(slow); err != nil {
		t.Fatal(err)
	}
	if err := <-failed; !errors.Is(err, kms.ErrKEKVersion) {
		t.Errorf("where the command fails: %v", err)
	}
}
