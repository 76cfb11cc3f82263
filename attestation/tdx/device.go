package tdx

import (
	"errors"
	"fmt"
	"strings"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"

	"github.com/keyagent/keyagent/attestation"
)

// provider is what configfs calls the TDX guest driver.
const provider = "tdx_guest"

// quoter gives a quote over report data.
type quoter func(reportData [64]byte) ([]byte, error)

// Detect says how this machine gives quotes: "configfs-tsm" or "device PATH". A
// machine that is no TD gives an error that wraps [attestation.ErrNoDevice].
func Detect(opts IssuerOptions) (how string, err error) {
	_, how, err = opts.withDefaults().detect()
	return how, err
}

// detect prefers configfs, which every kernel since 6.7 has. There the driver
// speaks with the quoting service of the host; the device of older kernels does so
// only with Intel's patches.
func (o IssuerOptions) detect() (quoter, string, error) {
	tsm := o.TSM
	var err error
	if tsm == nil {
		tsm, err = linuxtsm.MakeClient()
	}
	if err == nil {
		if err = checkProvider(tsm); err == nil {
			return func(data [64]byte) ([]byte, error) { return quoteByTSM(tsm, data) }, "configfs-tsm", nil
		}
	}
	deviceErr := checkDevice(o.Device)
	if deviceErr == nil {
		return func(data [64]byte) ([]byte, error) { return quoteByDevice(o.Device, data) }, "device " + o.Device, nil
	}
	return nil, "", fmt.Errorf("%w: configfs: %w; %w (hint: is the tdx_guest driver loaded, and configfs mounted?)", attestation.ErrNoDevice, err, deviceErr)
}

func checkProvider(tsm configfsi.Client) error {
	r, err := report.Create(tsm, &report.Request{})
	if err != nil {
		return err
	}
	got, err := r.ReadOption("provider")
	if err := errors.Join(err, r.Destroy()); err != nil {
		return err
	}
	if name := strings.TrimSpace(string(got)); name != provider {
		return fmt.Errorf("its reports are of %q", name)
	}
	return nil
}

func quoteByTSM(tsm configfsi.Client, data [64]byte) ([]byte, error) {
	r, err := report.Get(tsm, &report.Request{InBlob: data[:]})
	if err != nil {
		return nil, err
	}
	return r.OutBlob, nil
}
