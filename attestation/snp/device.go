package snp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/linuxtsm"
	"github.com/google/go-configfs-tsm/report"
	"github.com/google/go-sev-guest/client"
	"github.com/google/go-sev-guest/client/linuxabi"

	"github.com/keyagent/keyagent/attestation"
)

// DefaultDevice is the kernel's driver for guests of SEV-SNP.
const DefaultDevice = "/dev/sev-guest"

// The ways to a report, as [Detect] names them.
const (
	ViaTSM    = "configfs-tsm"
	ViaDevice = DefaultDevice
)

// provider is how the kernel names this hardware in its configfs.
const provider = "sev_guest"

// hardware gives reports over 64 bytes, with the host's certificate table.
type hardware interface {
	report(data [64]byte, vmpl *uint) (report, table []byte, err error)
}

// find looks for the hardware without asking it for a report.
func (o IssuerOptions) find() (hardware, string, error) {
	tsm, err := o.tsm()
	if err == nil {
		return tsm, ViaTSM, nil
	}
	path := o.Device
	if path == "" {
		path = DefaultDevice
	}
	if o.open != nil {
		return ioctl{path, o.open}, path, nil
	}
	info, statErr := os.Stat(path)
	if statErr == nil && info.Mode()&fs.ModeCharDevice != 0 {
		return ioctl{path, func() client.Device { return new(client.LinuxDevice) }}, path, nil
	}
	if statErr == nil {
		statErr = fmt.Errorf("%s is not a device", path)
	}
	return nil, "", fmt.Errorf("%w: no SEV-SNP: %w; %w", attestation.ErrNoDevice, err, statErr)
}

// Detect says whether this machine can make reports, and how: "configfs-tsm" or
// the device's path. It asks for none. An error wraps [attestation.ErrNoDevice].
func Detect(opts IssuerOptions) (how string, err error) {
	_, how, err = opts.find()
	return how, err
}

// tsm finds the kernel's interface for all kinds of confidential VMs, and demands
// that this is one of SEV-SNP.
func (o IssuerOptions) tsm() (tsm, error) {
	c := o.TSM
	if c == nil {
		var err error
		if c, err = linuxtsm.MakeClient(); err != nil {
			return tsm{}, err
		}
	}
	r, err := report.CreateOpenReport(c)
	if err != nil {
		return tsm{}, err
	}
	name, err := r.ReadOption("provider")
	if err = errors.Join(err, r.Destroy()); err != nil {
		return tsm{}, err
	}
	if got := strings.TrimSpace(string(name)); got != provider {
		return tsm{}, fmt.Errorf("configfs-tsm is of %q, not %q", got, provider)
	}
	return tsm{c}, nil
}

type tsm struct{ client configfsi.Client }

func (t tsm) report(data [64]byte, vmpl *uint) ([]byte, []byte, error) {
	req := report.Request{InBlob: data[:]}
	if vmpl != nil {
		req.Privilege = &report.Privilege{Level: *vmpl}
	}
	rsp, err := get(t.client, req)
	if err != nil {
		return nil, nil, err
	}
	if got := strings.TrimSpace(rsp.Provider); got != provider {
		return nil, nil, fmt.Errorf("configfs-tsm is of %q, not %q", got, provider)
	}
	return rsp.OutBlob, rsp.AuxBlob, nil
}

// get asks with the host's certificates. A host without them is no reason to go
// without a report.
func get(c configfsi.Client, req report.Request) (*report.Response, error) {
	req.GetAuxBlob = true
	rsp, err := report.Get(c, &req)
	if err != nil {
		req.GetAuxBlob = false
		rsp, err = report.Get(c, &req)
	}
	return rsp, err
}

// ioctl talks to the driver itself, which kernels before 6.7 have only.
type ioctl struct {
	path string
	open func() client.Device
}

func (d ioctl) report(data [64]byte, vmpl *uint) ([]byte, []byte, error) {
	dev := d.open()
	if err := dev.Open(d.path); err != nil {
		return nil, nil, err
	}
	defer dev.Close()
	question := linuxabi.SnpReportReqABI{ReportData: data}
	if vmpl != nil {
		question.Vmpl = uint32(*vmpl)
	}
	// As much room as the driver takes, so that one question is enough: go-sev-guest
	// waits two seconds before a second one.
	var rsp linuxabi.SnpReportRespABI
	extended := linuxabi.SnpExtendedReportReq{Data: question, Certs: make([]byte, maxTable), CertsLength: maxTable}
	err := call(dev, linuxabi.IocSnpGetExtendedReport, &linuxabi.SnpUserGuestRequest{ReqData: &extended, RespData: &rsp})
	if err == nil {
		return rsp.Data[:ReportSize], extended.Certs, nil
	}
	rsp = linuxabi.SnpReportRespABI{}
	if again := call(dev, linuxabi.IocSnpGetReport, &linuxabi.SnpUserGuestRequest{ReqData: &question, RespData: &rsp}); again != nil {
		return nil, nil, errors.Join(err, again)
	}
	return rsp.Data[:ReportSize], nil, nil
}

func call(dev client.Device, command uintptr, req *linuxabi.SnpUserGuestRequest) error {
	result, err := dev.Ioctl(command, req)
	if err != nil {
		return fmt.Errorf("sev-guest command %#x, firmware error %#x: %w", command, req.FwErr, err)
	}
	if result != uintptr(linuxabi.EsOk) {
		return fmt.Errorf("sev-guest command %#x: result %d", command, result)
	}
	return nil
}
