package policy_test

import (
	"fmt"
	"time"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/attestation/facts"
	"github.com/keyagent/keyagent/attestation/policy"
)

const examplePolicy = `version: 2
lifetime: 15m
trust:
  tpm:
    enrolled:
      - {name: rack-7, ek: "7777777777777777777777777777777777777777777777777777777777777777"}
profiles:
  - name: node
    tpm:
      trust: ["enrolled:rack-7"]
      bank: sha256
      event_log: optional
      pcrs:
        - {pcr: 11, accept: ["1111111111111111111111111111111111111111111111111111111111111111"]}
grants:
  - {name: disks, profiles: [node], volumes: ["data-*"], operations: [open]}
...
`

// A verifier gives claims; a policy says what they are worth, and what they may do.
func ExamplePolicy() {
	p, err := policy.Parse(policy.Builtin(), "policy.yaml", []byte(examplePolicy))
	if err != nil {
		fmt.Println(err)
		return
	}
	register := make([]byte, 32)
	for i := range register {
		register[i] = 0x11
	}
	claims := attestation.Claims{Kind: attestation.TPM, Trust: "enrolled:rack-7", Facts: map[string]any{},
		Measurements: map[string]attestation.Measurement{"pcr11": {Value: register}}}
	facts.EventLog.Put(claims.Facts, false)

	judge := func() (*policy.Appraisal, error) {
		// Only code that ran the verifiers calls NewVerified.
		v, err := attestation.NewVerified(attestation.Binder{}, time.Now(), claims)
		if err != nil {
			return nil, err
		}
		return p.Appraise(v)
	}
	appraisal, err := judge()
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, volume := range []string{"data-1", "other"} {
		_, err := p.Authorize(appraisal, policy.Request{Volume: volume, Operation: policy.Open, Now: time.Now()})
		fmt.Println(volume, err)
	}
	register[0] ^= 1
	_, err = judge()
	fmt.Println(err)
	// Output:
	// data-1 <nil>
	// other policy denied: no grant for profile "node" covers volume "other"
	// evidence refused: no profile fits: closest is "node": pcr11: expected 1111111111111111111111111111111111111111111111111111111111111111, found 1011111111111111111111111111111111111111111111111111111111111111
}
