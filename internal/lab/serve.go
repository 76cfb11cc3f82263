package lab

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"sync"
)

// maxMessage bounds a TPM command or response. TPM 2.0 ones are below 4 KiB.
const maxMessage = 64 << 10

// Serve runs the TPM without a guest, for programs of this machine: any number
// of connections to the unix socket at path, each carrying TPM commands and
// responses with nothing around them. Nothing is measured into it: it starts up
// as after a power cycle. stop ends it and removes the socket, as ctx does.
func (t *TPM) Serve(ctx context.Context, path string) (stop func(), err error) {
	s, err := t.serve(ctx, path)
	if err != nil {
		return nil, fmt.Errorf("serve TPM: %w", err)
	}
	return s.stop, nil
}

// server passes the commands of all connections, one by one, to one swtpm, which
// by itself would serve one connection and let the others wait until it ends.
type server struct {
	cancel   context.CancelFunc
	listener net.Listener
	tpm      net.Conn
	process  *process
	running  sync.WaitGroup

	mu      sync.Mutex // held for one command and its response
	connsMu sync.Mutex
	conns   map[net.Conn]bool // nil once stopped
}

func (t *TPM) serve(ctx context.Context, path string) (_ *server, err error) {
	program, err := tool("swtpm")
	if err != nil {
		return nil, err
	}
	ours, theirs, err := socketPair()
	if err != nil {
		return nil, err
	}
	defer ours.Close()
	defer theirs.Close()
	s := &server{conns: map[net.Conn]bool{}}
	if s.tpm, err = net.FileConn(ours); err != nil {
		return nil, err
	}
	if s.listener, err = net.Listen("unix", path); err != nil {
		s.tpm.Close()
		return nil, err
	}
	ctx, s.cancel = context.WithCancel(ctx)
	cmd := exec.CommandContext(ctx, program, "socket", "--tpm2", "--tpmstate", "dir="+t.Dir,
		"--fd", "3", "--flags", "not-need-init,startup-clear")
	cmd.ExtraFiles = []*os.File{theirs}
	if s.process, err = startProcess(cmd); err != nil {
		s.cancel()
		s.listener.Close()
		s.tpm.Close()
		return nil, err
	}
	s.running.Add(1)
	go s.accept()
	context.AfterFunc(ctx, s.hangUp)
	return s, nil
}

func (s *server) stop() {
	s.cancel()
	s.hangUp()
	s.running.Wait()
	<-s.process.done
}

// hangUp makes every goroutine of the server end.
func (s *server) hangUp() {
	s.listener.Close()
	s.tpm.Close()
	s.connsMu.Lock()
	defer s.connsMu.Unlock()
	for conn := range s.conns {
		conn.Close()
	}
	s.conns = nil
}

func (s *server) accept() {
	defer s.running.Done()
	for {
		conn, err := s.listener.Accept()
		if err != nil {
			return
		}
		s.connsMu.Lock()
		if s.conns == nil {
			s.connsMu.Unlock()
			conn.Close()
			return
		}
		s.conns[conn] = true
		s.running.Add(1)
		s.connsMu.Unlock()
		go s.relay(conn)
	}
}

func (s *server) relay(conn net.Conn) {
	defer s.running.Done()
	defer func() {
		conn.Close()
		s.connsMu.Lock()
		defer s.connsMu.Unlock()
		delete(s.conns, conn)
	}()
	for {
		command, err := readMessage(conn)
		if err != nil {
			return
		}
		response, err := s.exchange(command)
		if err != nil {
			return
		}
		if _, err := conn.Write(response); err != nil {
			return
		}
	}
}

func (s *server) exchange(command []byte) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, err := s.tpm.Write(command); err != nil {
		return nil, err
	}
	return readMessage(s.tpm)
}

// readMessage reads a command or a response: a tag of 2 bytes, the length of the
// whole in 4, and the rest.
func readMessage(r io.Reader) ([]byte, error) {
	header := make([]byte, 6)
	if _, err := io.ReadFull(r, header); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < 10 || size > maxMessage {
		return nil, errors.New("not a TPM message")
	}
	message := make([]byte, size)
	copy(message, header)
	_, err := io.ReadFull(r, message[6:])
	return message, err
}
