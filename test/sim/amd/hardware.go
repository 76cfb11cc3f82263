package amd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-sev-guest/client"
	"github.com/google/go-sev-guest/client/linuxabi"
	"github.com/google/go-sev-guest/proto/sevsnp"

	"github.com/keyagent/keyagent/attestation/snp"
)

// Guest is what a confidential VM finds on a chip. It stands in for the kernel's
// configfs and for its device.
type Guest struct {
	Chip *Chip
	// Report is the template of its reports, which get the data that is asked for.
	Report Report
	// Table is the host's certificate table. Nil: the host has none.
	Table []byte
	// Manifest is that of the SVSM's service, whatever its GUID. Nil: there is no
	// SVSM.
	Manifest []byte
	// Provider is the kernel's name of the hardware. Empty: "sev_guest".
	Provider string
	// Fault, if set, is what a request for a report ends with.
	Fault error

	mu      sync.Mutex
	n       int
	entries map[string]*tsmEntry
}

type tsmEntry struct {
	generation int
	data       [64]byte
	vmpl       *uint32
	service    bool
}

var _ configfsi.Client = (*Guest)(nil)

// TSM is the guest's configfs.
func (g *Guest) TSM() configfsi.Client { return g }

func (g *Guest) sign(data [64]byte, vmpl *uint32) ([]byte, error) {
	if g.Fault != nil {
		return nil, g.Fault
	}
	r := g.Report
	r.Data = data
	if vmpl != nil {
		r.VMPL = *vmpl
	}
	return g.Chip.Sign(r)
}

// MkdirTemp implements configfsi.Client.
func (g *Guest) MkdirTemp(dir, pattern string) (string, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if dir != configfsi.TsmPrefix+"/report" {
		return "", os.ErrNotExist
	}
	if g.entries == nil {
		g.entries = map[string]*tsmEntry{}
	}
	g.n++
	name := path.Join(dir, pattern+strconv.Itoa(g.n))
	g.entries[name] = &tsmEntry{}
	return name, nil
}

// ReadFile implements configfsi.Client.
func (g *Guest) ReadFile(name string) ([]byte, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.entries[path.Dir(name)]
	if e == nil {
		return nil, os.ErrNotExist
	}
	switch path.Base(name) {
	case "generation":
		return fmt.Appendf(nil, "%d\n", e.generation), nil
	case "provider":
		if g.Provider != "" {
			return []byte(g.Provider + "\n"), nil
		}
		return []byte("sev_guest\n"), nil
	case "outblob":
		if e.service {
			return g.sign(snp.ServiceReportData(e.data, g.Manifest), nil)
		}
		return g.sign(e.data, e.vmpl)
	case "manifestblob":
		if !e.service {
			return nil, syscall.EINVAL
		}
		return bytes.Clone(g.Manifest), nil
	case "auxblob":
		if g.Table == nil {
			return nil, syscall.EINVAL
		}
		return bytes.Clone(g.Table), nil
	}
	return nil, os.ErrNotExist
}

// WriteFile implements configfsi.Client.
func (g *Guest) WriteFile(name string, contents []byte) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	e := g.entries[path.Dir(name)]
	if e == nil {
		return os.ErrNotExist
	}
	switch path.Base(name) {
	case "inblob":
		if len(contents) != len(e.data) {
			return syscall.EINVAL
		}
		e.data = [64]byte(contents)
	case "privlevel":
		n, err := strconv.ParseUint(strings.TrimSpace(string(contents)), 10, 2)
		if err != nil {
			return syscall.EINVAL
		}
		level := uint32(n)
		e.vmpl = &level
	case "service_provider":
		if string(contents) != "svsm" || g.Manifest == nil {
			return syscall.ENXIO
		}
		e.service = true
	case "service_guid", "service_manifest_version":
		if !e.service {
			return syscall.EINVAL
		}
	default:
		return os.ErrPermission
	}
	e.generation++
	return nil
}

// ReadDir implements configfsi.Client.
func (g *Guest) ReadDir(string) ([]os.DirEntry, error) { return nil, os.ErrInvalid }

// RemoveAll implements configfsi.Client.
func (g *Guest) RemoveAll(name string) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.entries[name] == nil {
		return os.ErrNotExist
	}
	delete(g.entries, name)
	return nil
}

// Left is how many entries nobody removed.
func (g *Guest) Left() int {
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.entries)
}

// Device is the guest's driver.
func (g *Guest) Device() client.Device { return device{g} }

type device struct{ g *Guest }

func (device) Open(string) error           { return nil }
func (device) Close() error                { return nil }
func (device) Product() *sevsnp.SevProduct { return nil }

// Ioctl implements client.Device.
func (d device) Ioctl(command uintptr, arg any) (uintptr, error) {
	req, ok := arg.(*linuxabi.SnpUserGuestRequest)
	if !ok {
		return 0, syscall.ENOTTY
	}
	var question linuxabi.SnpReportReqABI
	switch q := req.ReqData.(type) {
	case *linuxabi.SnpReportReqABI:
		question = *q
	case *linuxabi.SnpExtendedReportReq:
		question = q.Data
		// As the driver: whole pages, and no more than four.
		if q.CertsLength%4096 != 0 || q.CertsLength > 16<<10 {
			return 0, syscall.EINVAL
		}
		if d.g.Table == nil {
			return 0, errors.New("the host does not know extended reports")
		}
		copy(q.Certs, d.g.Table)
	default:
		return 0, syscall.ENOTTY
	}
	report, err := d.g.sign(question.ReportData, &question.Vmpl)
	if err != nil {
		return 0, err
	}
	copy(req.RespData.(*linuxabi.SnpReportRespABI).Data[:], report)
	return 0, nil
}
