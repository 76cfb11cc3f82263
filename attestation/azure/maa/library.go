//go:build !keyagent_nomaa

package maa

import (
	"context"
	"io"
	"net/http"

	"github.com/edgelesssys/go-azguestattestation/maa"
)

// maxAnswer bounds an answer in bytes; the library reads what comes.
const maxAnswer = 256 << 10

func newAttester(opts Options) (func(context.Context, []byte) (string, error), error) {
	client := bounded{opts.Client}
	return func(ctx context.Context, nonce []byte) (string, error) {
		return maa.Attest(ctx, nonce, opts.URL, client)
	}, nil
}

type bounded struct{ client *http.Client }

// Do implements the library's interface.
func (b bounded) Do(r *http.Request) (*http.Response, error) {
	rsp, err := b.client.Do(r)
	if err != nil {
		return nil, err
	}
	rsp.Body = struct {
		io.Reader
		io.Closer
	}{io.LimitReader(rsp.Body, maxAnswer), rsp.Body}
	return rsp, nil
}
