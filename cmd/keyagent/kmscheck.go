//go:build !keyagent_node

package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/storage"
)

func newKMSCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check URI...",
		Short: "Use each URI as the key service would, and say which step fails",
		Long: `Use each URI as the key service would, and say which step fails.

A kms:// URI is asked for a new key, which must come back from its wrapped form,
and only for the volume that it was made for. A storage:// URI gets an object
that is read back, changed, and deleted; a write that expects another version
must fail. Nothing stays behind.`,
		Example: `  keyagent kms check 'kms://cluster-kms?file=/etc/keyagent/master.secret'
  keyagent kms check kms://command?command=get-kek storage://file?dir=/var/lib/keyagent/records`,
		Args: cobra.MinimumNArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, uris []string) error {
		if err := refuseSecrets(uris...); err != nil {
			return err
		}
		var report checkReport
		var failed error
		for _, uri := range uris {
			err := report.check(cmd.Context(), uri)
			if failed == nil {
				failed = err
			}
		}
		if err := print(cmd, *output, report.Steps, report.print); err != nil {
			return err
		}
		return failed
	}
	return cmd
}

// checkReport is what each step of each URI gave.
type checkReport struct {
	Steps []checkStep
}

type checkStep struct {
	Backend string `json:"backend"` // the URI without its parameters
	Step    string `json:"step"`
	OK      bool   `json:"ok"`
	Error   string `json:"error,omitempty"`
}

func (r *checkReport) print(w io.Writer) {
	for _, s := range r.Steps {
		result := "ok"
		if s.Error != "" {
			result = "FAILED: " + s.Error
		}
		fmt.Fprintf(w, "%-24s %-46s %s\n", s.Backend, s.Step, result)
	}
}

// step runs one step and notes how it went.
func (r *checkReport) step(backend, name string, f func() error) error {
	err := f()
	s := checkStep{Backend: backend, Step: name, OK: err == nil}
	if err != nil {
		s.Error = err.Error()
		err = fmt.Errorf("%s: %s: %w", backend, name, err)
		if errors.Is(err, errCheck) {
			err = failure.New(failure.WrongKey, err, "it must not be used")
		}
		err = keyservice.BackendError(err)
	}
	r.Steps = append(r.Steps, s)
	return err
}

// errCheck: a backend did what it must not, or not what it must.
var errCheck = errors.New("the backend does not keep its contract")

func (r *checkReport) check(ctx context.Context, uri string) error {
	backend := setup.Redact(uri)
	if strings.HasPrefix(uri, "storage://") {
		return r.checkStorage(ctx, backend, uri)
	}
	return r.checkKMS(ctx, backend, uri)
}

func (r *checkReport) checkKMS(ctx context.Context, backend, uri string) error {
	// An ID that no volume has.
	b := kms.Binding{VolumeID: "c0ffee00-0000-4000-8000-000000000001", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	var k setup.Keys
	var key *secret.Bytes
	var w kms.Wrapped
	if err := r.step(backend, "open", func() (err error) { k, err = setup.KMS(ctx, uri); return err }); err != nil {
		return err
	}
	defer k.Close()
	if err := r.step(backend, "make a key", func() (err error) { key, w, err = k.Generate(ctx, b); return err }); err != nil {
		return err
	}
	defer key.Close()
	if err := r.step(backend, "get it back from its wrapped form", func() error {
		again, err := k.Unwrap(ctx, b, w)
		if err != nil {
			return err
		}
		defer again.Close()
		if !again.Equal(key) {
			return fmt.Errorf("%w: another key came back", errCheck)
		}
		return nil
	}); err != nil {
		return err
	}
	if err := r.step(backend, "name the KEK in force", func() error {
		name, err := k.Current(ctx)
		if err == nil && w.KEK != name {
			err = fmt.Errorf("%w: a key was created under another KEK than the one in force", errCheck)
		}
		return err
	}); err != nil {
		return err
	}
	return r.step(backend, "refuse it for another volume", func() error {
		other := b
		other.VolumeID = "c0ffee00-0000-4000-8000-000000000002"
		wrapped, err := k.Wrap(ctx, b, key)
		if err != nil {
			return err
		}
		again, err := k.Unwrap(ctx, other, wrapped)
		switch {
		case errors.Is(err, kms.ErrWrongKey):
			return nil
		case err != nil:
			return err
		}
		return errors.Join(fmt.Errorf("%w: a wrapped key opened for another volume", errCheck), again.Close())
	})
}

func (r *checkReport) checkStorage(ctx context.Context, backend, uri string) (err error) {
	var s setup.Objects
	if err := r.step(backend, "open", func() (err error) { s, err = setup.Storage(ctx, uri); return err }); err != nil {
		return err
	}
	defer s.Close()
	name := "check/" + rand.Text()
	first, second := []byte("keyagent kms check"), []byte("keyagent kms check, changed")
	var v storage.Version
	if err := r.step(backend, "write an object", func() (err error) { v, err = s.Put(ctx, name, first, storage.Absent); return err }); err != nil {
		return err
	}
	defer func() {
		if deleteErr := r.step(backend, "delete it", func() error { return s.Delete(ctx, name, v) }); err == nil {
			err = deleteErr
		}
	}()
	if err := r.step(backend, "read it", func() error {
		data, got, err := s.Get(ctx, name)
		if err == nil && (!bytes.Equal(data, first) || got != v) {
			err = fmt.Errorf("%w: another object came back", errCheck)
		}
		return err
	}); err != nil {
		return err
	}
	if err := r.step(backend, "refuse a write that expects another version", func() error {
		_, err := s.Put(ctx, name, second, storage.Absent)
		switch {
		case errors.Is(err, storage.ErrConflict):
			return nil
		case err != nil:
			return err
		}
		return fmt.Errorf("%w: the write was not refused", errCheck)
	}); err != nil {
		return err
	}
	if err := r.step(backend, "change it", func() error {
		next, err := s.Put(ctx, name, second, v)
		if err == nil {
			v = next
		}
		return err
	}); err != nil {
		return err
	}
	return r.step(backend, "list it", func() error {
		names, err := s.List(ctx, name, "", 2)
		if err == nil && (len(names) != 1 || names[0] != name) {
			err = fmt.Errorf("%w: it is not in the list", errCheck)
		}
		return err
	})
}
