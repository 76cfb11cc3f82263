package eventlog_test

import (
	"fmt"
	"os"

	"github.com/keyagent/keyagent/attestation/eventlog"
)

// A firmware's log, in words. Nothing of it is proved until it replays to a register.
func ExampleDescribe() {
	log, err := os.ReadFile("../tpm/testdata/ovmf.eventlog")
	if err != nil {
		fmt.Println(err)
		return
	}
	events, err := eventlog.Parse(log, eventlog.SHA256, 1000)
	if err != nil {
		fmt.Println(err)
		return
	}
	for i, e := range events[:3] {
		d := eventlog.Describe(i+1, e)
		fmt.Println(d.Seq, d.Type, d.Name)
	}
	// Output:
	// 1 EV_S_CRTM_VERSION firmware version
	// 2 EV_EFI_PLATFORM_FIRMWARE_BLOB firmware
	// 3 EV_EFI_PLATFORM_FIRMWARE_BLOB firmware
}
