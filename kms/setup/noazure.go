//go:build keyagent_noazure

package setup

import (
	"context"

	"github.com/keyagent/keyagent/kms"
)

func azureKMS(_ context.Context, u *kms.URI) (Keys, error) {
	return nil, leftOut(u, "keyagent_noazure")
}

func azureStorage(_ context.Context, u *kms.URI) (Objects, error) {
	return nil, leftOut(u, "keyagent_noazure")
}
