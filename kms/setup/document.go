//go:build !keyagent_noaws

package setup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"

	"github.com/keyagent/keyagent/internal/shell"
)

// documentCommand is a command that makes attestation documents: it reads a
// public key in DER form (PKIX) and prints the document.
type documentCommand string

const (
	documentDeadline = 30 * time.Second
	maxDocument      = 16 << 10
)

// Document runs the command.
func (c documentCommand) Document(ctx context.Context, publicKey []byte) ([]byte, error) {
	var out []byte
	err := shell.Run(ctx, shell.Command{
		Name: "attestation command", Text: string(c), Stdin: bytes.NewReader(publicKey), Deadline: documentDeadline, Log: slog.Default(),
		Stdout: func(r io.Reader) (err error) {
			out, err = io.ReadAll(io.LimitReader(r, maxDocument+1))
			if err == nil && len(out) > maxDocument {
				err = fmt.Errorf("it printed more than %d bytes", maxDocument)
			}
			return err
		},
	})
	if err == nil && len(out) == 0 {
		err = errors.New("it printed no document")
	}
	if err != nil {
		return nil, fmt.Errorf("attestation command: %w", err)
	}
	return out, nil
}
