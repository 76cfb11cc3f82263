//go:build keyagent_noaws

package setup

import (
	"context"

	"github.com/keyagent/keyagent/kms"
)

func awsKMS(_ context.Context, u *kms.URI) (Keys, error) { return nil, leftOut(u, "keyagent_noaws") }

func awsStorage(_ context.Context, u *kms.URI) (Objects, error) {
	return nil, leftOut(u, "keyagent_noaws")
}
