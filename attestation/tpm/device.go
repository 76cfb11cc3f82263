package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/attestation"
)

// DefaultDevice is the kernel's TPM with its resource manager.
const DefaultDevice = "/dev/tpmrm0"

// commandTimeout bounds one TPM command. Key generation on a slow discrete TPM
// takes tens of seconds; nothing takes longer.
const commandTimeout = 2 * time.Minute

// OpenDevice opens a TPM: a character device such as [DefaultDevice], or
// "unix:PATH" for one that speaks raw commands on a unix socket, as software
// TPMs do. A machine without the device gives an error that wraps
// [attestation.ErrNoDevice].
func OpenDevice(path string) (transport.TPMCloser, error) {
	if sock, ok := strings.CutPrefix(path, "unix:"); ok {
		c, err := net.DialTimeout("unix", sock, 10*time.Second)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", attestation.ErrNoDevice, err)
		}
		return alone(&stream{rw: c}), nil
	}
	// Not by os.OpenFile: that would make the descriptor non-blocking, and the
	// driver then answers reads before there is a response.
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("%w: %s: %w (hint: is the tpm driver loaded? set tpm.device)", attestation.ErrNoDevice, path, err)
	case err != nil:
		return nil, fmt.Errorf("%w: %s: %w", attestation.ErrNoDevice, path, err)
	}
	f := os.NewFile(uintptr(fd), path)
	if st, err := f.Stat(); err != nil || st.Mode()&fs.ModeCharDevice == 0 {
		f.Close()
		return nil, fmt.Errorf("%w: %s is not a character device (hint: write unix:%s for a socket)", attestation.ErrNoDevice, path, path)
	}
	if strings.HasPrefix(filepath.Base(path), "tpmrm") {
		return &stream{rw: f}, nil
	}
	return alone(&stream{rw: f}), nil
}

// alone takes a TPM over that has no resource manager and serves one process at a time.
// It keeps what a process that was killed had loaded, has room for three objects, and
// would serve nobody again until it is reset.
func alone(s *stream) *stream {
	for _, left := range []tpm2.TPMHandle{transientFirst, loadedFirst} {
		rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: uint32(left), PropertyCount: 64}.Execute(s)
		if err != nil {
			return s // who uses it next says what is wrong with it
		}
		handles, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			return s
		}
		for _, h := range handles.Handle {
			_, _ = tpm2.FlushContext{FlushHandle: h}.Execute(s)
		}
	}
	return s
}

// The first handles of objects, and of sessions that are loaded (TPM 2.0 part 2, 7.2 and
// 7.4).
const (
	transientFirst tpm2.TPMHandle = 0x80000000
	loadedFirst    tpm2.TPMHandle = 0x02000000
)

// stream sends one command at a time and reads exactly one response.
type stream struct {
	mu     sync.Mutex
	rw     io.ReadWriteCloser
	broken bool
}

// Send implements transport.TPM.
func (s *stream) Send(command []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.broken {
		return nil, errors.New("tpm connection is out of step after an earlier error")
	}
	for try := 1; ; try++ {
		rsp, err := s.exchange(command)
		if err != nil {
			s.broken = true
			return nil, fmt.Errorf("tpm: %w", err)
		}
		if !startsLater(rsp) || try == maxTries {
			return rsp, nil
		}
		time.Sleep(time.Duration(try) * time.Millisecond)
	}
}

// maxTries bounds how often a command is sent again: ten seconds in all, which
// a self-test takes at most.
const maxTries = 140

// startsLater reports that the TPM did not begin the command and wants it
// again. The kernel's driver hides this; a socket does not.
func startsLater(rsp []byte) bool {
	switch tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:10])) {
	case tpm2.TPMRCRetry, tpm2.TPMRCYielded, tpm2.TPMRCTesting:
		return true
	}
	return false
}

func (s *stream) exchange(command []byte) ([]byte, error) {
	if d, ok := s.rw.(interface{ SetDeadline(time.Time) error }); ok {
		// A character device may not know deadlines; the driver has its own.
		_ = d.SetDeadline(time.Now().Add(commandTimeout))
	}
	if _, err := s.rw.Write(command); err != nil {
		return nil, err
	}
	// A response is at most 4096 bytes on the devices of the PC Client profile,
	// and the driver hands it over in one read; a socket may split it.
	const header = 10
	buf := make([]byte, 4096)
	n, err := io.ReadAtLeast(s.rw, buf, header)
	if err != nil {
		return nil, err
	}
	size := int(binary.BigEndian.Uint32(buf[2:6]))
	if size < header || size > len(buf) || n > size {
		return nil, fmt.Errorf("response claims %d bytes, %d arrived", size, n)
	}
	if _, err := io.ReadFull(s.rw, buf[n:size]); err != nil {
		return nil, err
	}
	return buf[:size], nil
}

// Close implements io.Closer.
func (s *stream) Close() error { return s.rw.Close() }
