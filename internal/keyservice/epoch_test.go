package keyservice

import (
	"encoding/hex"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

// The vector of docs/spec/audit.md, which another program computed.
func TestTheMACOfAnEpochHasItsVector(t *testing.T) {
	raw, err := hex.DecodeString("a98fd913c302fbb2e121e01ba0c74b3799bddf62d406283bdf3d0f35427a1525")
	must(t, err)
	key, err := secret.From(raw)
	must(t, err)
	e := &epochs{key: key}
	defer e.Close()
	mac, err := e.mac(1_800_000_000)
	must(t, err)
	if mac != "49d918bd4a4783ad1b56df552f34293fbac0f57117b8c60e030286a135eb4a26" {
		t.Error(mac)
	}
}
