package cluster

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/kmstest"
)

// BenchmarkDerive compares a derived key, in locked memory and with what the
// computation left erased, with HKDF alone.
func BenchmarkDerive(b *testing.B) {
	k := newKMS(b, testMaster, "")
	bind := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	info := string(bind.Encode(domainDerive))
	kmstest.Compare(b, func() error {
		key, _, err := k.Generate(b.Context(), bind)
		return errors.Join(err, key.Close())
	}, func() error {
		_, err := hkdf.Key(sha256.New, []byte(testMaster), nil, info, 32)
		return err
	})
}
