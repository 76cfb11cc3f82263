package cluster

import (
	"crypto/hkdf"
	"crypto/sha256"
	"testing"
	"time"

	"github.com/keyagent/keyagent/kms"
)

// BenchmarkDerive compares a derived key, in locked memory and with what the
// computation left erased, with HKDF alone.
func BenchmarkDerive(b *testing.B) {
	k := newKMS(b, testMaster, "")
	bind := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	info := string(bind.Encode(domainDerive))
	var mine, theirs time.Duration
	for b.Loop() { // in turns, so that both see the same machine
		start := time.Now()
		if _, err := hkdf.Key(sha256.New, []byte(testMaster), nil, info, 32); err != nil {
			b.Fatal(err)
		}
		middle := time.Now()
		key, _, err := k.Generate(b.Context(), bind)
		if err != nil {
			b.Fatal(err)
		}
		key.Close()
		theirs += middle.Sub(start)
		mine += time.Since(middle)
	}
	b.ReportMetric(float64(mine)/float64(theirs), "ratio")
	b.ReportMetric(float64(theirs.Nanoseconds())/float64(b.N), "bare-ns/op")
}
