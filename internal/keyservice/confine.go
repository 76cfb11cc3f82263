package keyservice

import (
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/kms/setup"
)

// reach is what the backends touch besides the network.
func (c *Config) reach() (all setup.Reach, err error) {
	for _, uri := range append([]string{c.KMS, c.Storage}, c.OldKMS...) {
		r, err := setup.ReachOf(uri)
		if err != nil {
			return all, BackendError(err)
		}
		all.Read, all.Write = append(all.Read, r.Read...), append(all.Write, r.Write...)
		all.Anything, all.Commands = all.Anything || r.Anything, all.Commands || r.Commands
	}
	return all, nil
}

// ConfineCalls takes system calls from this process that a key service with this
// configuration never needs. It comes before NewServer: a command that the configuration
// names fails at the start, or never.
func (c *Config) ConfineCalls() (bool, error) {
	r, err := c.reach()
	if err != nil {
		return false, err
	}
	work := confine.Keys
	if r.Commands {
		work = confine.Commands
	}
	ok, err := confine.Syscalls(work)
	return ok, failure.New(failure.Internal, err, "")
}

// ConfineFiles takes from this process all files but the service's own, whose
// configuration is at path. It comes after NewServer, which makes what is not there yet.
// It returns the version of landlock, or 0 if the kernel has none, or if a command runs
// whose files only the operator knows.
func (s *Server) ConfineFiles(path string) (int, error) {
	r, err := s.cfg.reach()
	if err != nil || r.Commands {
		return 0, err
	}
	p := confine.Paths{
		Read:     append(r.Read, path, s.cfg.TLS.Certificate, s.cfg.TLS.Key, s.cfg.Policy, os.Getenv("CREDENTIALS_DIRECTORY")),
		Write:    append(r.Write, s.cfg.Endorsements.Cache),
		Anything: r.Anything,
		Evidence: s.cfg.TPM != nil || len(s.cfg.Evidence) > 0,
	}
	p.Read = append(p.Read, s.policy.Current().Files()...)
	if s.cfg.Admin != "" {
		p.Sockets = []string{s.cfg.Admin}
	}
	if s.cfg.TPM != nil {
		p.Read, p.Devices = append(p.Read, s.cfg.TPM.EventLog), append(p.Devices, s.cfg.TPM.Device)
	}
	version, err := confine.Files(p)
	s.confined = version > 0
	return version, failure.New(failure.Internal, err, "")
}

// outOfReach gives the error of a reload the hint that the process itself may be why.
func (s *Server) outOfReach(err error) error {
	if s.confined && errors.Is(err, fs.ErrPermission) {
		return fmt.Errorf("%w (hint: the service reads only the folders that were named when it started: restart it, or put the file into one of them)", err)
	}
	return err
}
