package node

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/witness"
)

// The NV index of the witness's memory, among those that a TPM's owner gives out (TCG registry
// of reserved handles: 0x01800000 to 0x01BFFFFF).
const witnessIndex = 0x01_8B_4B_57

// witnessPause spares the NV memory of a hardware TPM, which bears some hundred thousand
// writes: a node that opens volumes all the time writes its first checkpoint of a boot, four an
// hour, and the last.
const witnessPause = 15 * time.Minute

// The words of the field witness.
const (
	witnessTPM    = "tpm"
	witnessMemory = "memory"
)

func (c *Config) checkWitness() error {
	switch {
	case c.Witness == "", c.Witness == witnessTPM, c.Witness == witnessMemory:
		return nil
	case !filepath.IsAbs(c.Witness) || filepath.Clean(c.Witness) != c.Witness:
		return errors.New("must be tpm, memory, or a plain absolute path")
	}
	return nil
}

func (c *Config) witness(log *slog.Logger) *witness.Witness {
	o := witness.Options{Log: log, Every: witnessPause}
	nv := &tpm.NV{Device: c.TPM.Device, Index: witnessIndex, Size: witness.Size}
	switch c.Witness {
	case witnessMemory:
	case witnessTPM:
		o.Memory = nv
	case "":
		o.Memory = &either{first: nv, second: witnessFile(filepath.Join(c.StateDir, "witness"))}
	default:
		o.Memory, o.Every = witnessFile(c.Witness), 0
	}
	return witness.New(o)
}

// Witnessed returns what this node remembers of the key service's audit logs.
func (c *Config) Witnessed(log *slog.Logger) []witness.Log { return c.witness(log).Logs() }

// either is the first memory, or the second where the machine has not the first.
type either struct {
	first, second witness.Memory
	none          bool // there is no first
}

func (e *either) Load() ([]byte, error) {
	data, err := e.first.Load()
	e.none = errors.Is(err, attestation.ErrNoDevice)
	if e.none || err == nil && data == nil {
		return e.second.Load()
	}
	return data, err
}

func (e *either) Store(data []byte) error {
	if e.none {
		return e.second.Store(data)
	}
	err := e.first.Store(data)
	if errors.Is(err, tpm.ErrNV) {
		// No room, or not ours to use: a file is better than nothing.
		return errors.Join(err, e.second.Store(data))
	}
	return err
}

// witnessFile is a memory in a file.
type witnessFile string

func (f witnessFile) Load() ([]byte, error) {
	data, err := config.ReadPublicFile(string(f), witness.Size)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return data, err
}

func (f witnessFile) Store(data []byte) error {
	return errors.Join(os.MkdirAll(filepath.Dir(string(f)), 0o700), config.ReplaceFile(string(f), data))
}
