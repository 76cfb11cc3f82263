//go:build keyagent_noaws

package setup

import (
	"context"
	"fmt"

	"github.com/keyagent/keyagent/kms"
)

func awsStorage(context.Context, *kms.URI) (store, error) {
	return nil, fmt.Errorf("%w: this keyagent was built without storage://aws (hint: build it without the tag keyagent_noaws)", kms.ErrURI)
}
