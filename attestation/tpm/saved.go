package tpm

import "crypto/rand"

// SelfAsk returns what a verifier would ask this TPM, and the secret that it
// would keep, for evidence in a file.
func (a *attempt) SelfAsk(pcrs []uint32) (ask, secret []byte, err error) {
	o, err := parseOffer(a.offer)
	if err != nil {
		return nil, nil, err
	}
	if o.ek == nil {
		ask, err = askPCRs(pcrs)
		return ask, nil, err
	}
	secret = make([]byte, credentialSize)
	rand.Read(secret)
	ask, err = o.ask(pcrs, secret)
	return ask, secret, err
}
