package intel

import (
	"bytes"
	"crypto/rand"
	"io/fs"
	"syscall"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/google/go-configfs-tsm/configfs/faketsm"
)

// bufferSize is the kernel's for quotes; what a quote leaves of it is NUL.
const bufferSize = 8192

// TSM is the configfs of a TD on the machine: its quotes have fields, and the
// report data that was asked for.
func (m *Machine) TSM(fields Fields) configfsi.Client {
	return TSM("tdx_guest", func(data [64]byte) ([]byte, error) {
		fields.Report = data
		q, err := m.Quote(fields)
		if err != nil {
			return nil, err
		}
		return append(q, bytes.Repeat([]byte{0}, max(0, bufferSize-len(q)))...), nil
	})
}

// TSM is a configfs of a provider whose reports a function makes.
func TSM(provider string, report func(data [64]byte) ([]byte, error)) configfsi.Client {
	return &faketsm.Client{Subsystems: map[string]configfsi.Client{"report": &faketsm.ReportSubsystem{
		Random:    rand.Reader,
		MakeEntry: func() *faketsm.ReportEntry { return entry() },
		CheckInAttr: func(_ *faketsm.ReportEntry, attr string, contents []byte) error {
			if attr != "inblob" || len(contents) != 64 {
				return syscall.EINVAL
			}
			return nil
		},
		ReadAttr: func(e *faketsm.ReportEntry, attr string) ([]byte, error) {
			switch attr {
			case "provider":
				return []byte(provider + "\n"), nil
			case "outblob":
				return report([64]byte(e.InAttrs["inblob"].Value))
			}
			return nil, fs.ErrNotExist
		},
	}}}
}

func entry() *faketsm.ReportEntry {
	// The generation that was read lies far off: the fake then reads anew each time.
	return &faketsm.ReportEntry{ReadGeneration: 1 << 40, InAttrs: map[string]*faketsm.ReportAttributeState{"inblob": {}}}
}
