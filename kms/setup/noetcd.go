//go:build keyagent_noetcd

package setup

import (
	"context"

	"github.com/keyagent/keyagent/kms"
)

func etcdStorage(_ context.Context, u *kms.URI) (Objects, error) {
	return nil, leftOut(u, "keyagent_noetcd")
}
