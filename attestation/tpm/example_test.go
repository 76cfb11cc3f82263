package tpm_test

import (
	"encoding/hex"
	"fmt"
	"os"

	"github.com/keyagent/keyagent/attestation/tpm"
)

// A log explains a register only if its events replay to the value that was quoted.
func ExampleEventLog_Explain() {
	raw, err := os.ReadFile("testdata/ovmf.eventlog")
	if err != nil {
		fmt.Println(err)
		return
	}
	log, err := tpm.ParseEventLog(raw)
	if err != nil {
		fmt.Println(err)
		return
	}
	quoted, err := hex.DecodeString("65caf8dd1e0ea7a6347b635d2b379c93b9a1351edc2afc3ecda700e534eb3068")
	if err != nil {
		fmt.Println(err)
		return
	}
	events, err := log.Explain(7, quoted)
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, e := range events {
		fmt.Println(e.Type, e.Name)
	}
	// Output:
	// EV_EFI_VARIABLE_DRIVER_CONFIG Secure Boot state (SecureBoot)
	// EV_EFI_VARIABLE_DRIVER_CONFIG Secure Boot PK
	// EV_EFI_VARIABLE_DRIVER_CONFIG Secure Boot KEK
	// EV_EFI_VARIABLE_DRIVER_CONFIG Secure Boot db
	// EV_EFI_VARIABLE_DRIVER_CONFIG Secure Boot dbx
	// EV_SEPARATOR separator
}
