// Package evidence reads saved evidence for commands, and appraises it.
package evidence

import (
	"bytes"
	"fmt"
	"io"
	"os"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation/kinds"
	"github.com/keyagent/keyagent/attestation/saved"
	"github.com/keyagent/keyagent/internal/failure"
)

// Read reads a file of our own, or a report or quote as it is.
func Read(path string) (*attestv1.Saved, error) {
	data, err := ReadBounded(path, saved.MaxFile)
	if err != nil {
		return nil, err
	}
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("{")) {
		return parse(path, data)
	}
	s, err := kinds.Import(data)
	if err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("%s is neither a file of evidence nor an SNP report or a TDX quote, in bytes or hex: %w", path, err),
			"keyagent evidence --file FILE makes one")
	}
	return s, nil
}

// parse parses a file of our own.
func parse(path string, data []byte) (*attestv1.Saved, error) {
	s, err := saved.Parse(data)
	if err != nil {
		return nil, failure.New(failure.Usage, fmt.Errorf("%s is not a file of evidence: %w", path, err), "keyagent evidence --file FILE makes one")
	}
	return s, nil
}

// ReadBounded reads a file of at most limit bytes.
func ReadBounded(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, failure.New(failure.Usage, err, "")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = failure.Newf(failure.Usage, "", "%s is larger than %d bytes", path, limit)
	}
	return data, err
}
