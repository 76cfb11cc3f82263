//go:build keyagent_nomaa

package maa

import "context"

func newAttester(Options) (func(context.Context, []byte) (string, error), error) {
	return nil, ErrUnsupported
}
