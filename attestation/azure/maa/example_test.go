package maa_test

import (
	"fmt"

	"github.com/keyagent/keyagent/attestation/azure/maa"
)

// What New returns goes into azure.IssuerOptions. Tokens are asked for over https only.
func ExampleNew() {
	_, err := maa.New(maa.Options{URL: "http://shared.weu.attest.azure.net"})
	fmt.Println(err)
	// Output: attestation provider "http://shared.weu.attest.azure.net" is not an https address
}
