package tpm

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"github.com/keyagent/keyagent/test/sim/swtpm"
)

// measuring is a TPM of a boot that goes on: something is measured behind a quote.
type measuring struct {
	transport.TPM
	times int
	seen  int // quotes
}

func (m *measuring) Send(command []byte) ([]byte, error) {
	rsp, err := m.TPM.Send(command)
	if tpm2.TPMCC(binary.BigEndian.Uint32(command[6:])) == tpm2.TPMCCQuote {
		if m.seen++; m.seen <= m.times {
			_, extendErr := tpm2.PCRExtend{
				PCRHandle: tpm2.AuthHandle{Handle: 11, Auth: tpm2.PasswordAuth(nil)},
				Digests:   tpm2.TPMLDigestValues{Digests: []tpm2.TPMTHA{{HashAlg: tpm2.TPMAlgSHA256, Digest: make([]byte, 32)}}},
			}.Execute(m.TPM)
			err = errors.Join(err, extendErr)
		}
	}
	return rsp, err
}

// What a boot measures between the quote and the reading of the values is no forgery.
func TestWhatIsMeasuredDuringAQuoteIsQuotedAgain(t *testing.T) {
	f := newForger(t, swtpm.New(t, nil))
	pcrs := []uint32{0, 7, 11}
	for _, tt := range []struct {
		times, quotes int
		ok            bool
	}{{0, 1, true}, {1, 2, true}, {3, 4, true}, {100, maxQuotes, false}} {
		m := &measuring{TPM: f.tpm, times: tt.times}
		ev, err := quote(m, f.ak, f.clock, pcrs, testBinder)
		if err != nil {
			t.Fatal(err)
		}
		_, err = VerifyQuote(ev, must[any](t)(tpm2.Pub(f.ak.public)), testBinder, pcrs)
		if (err == nil) != tt.ok || !tt.ok && !errors.Is(err, ErrPCRDigest) || m.seen != tt.quotes {
			t.Errorf("measured %d times: %d quotes, %v", tt.times, m.seen, err)
		}
	}
}
