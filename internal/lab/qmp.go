package lab

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"sync"
	"time"
)

// monitor is QEMU's machine protocol: one JSON command at a time, and its
// answer, with events in between that nobody here needs.
type monitor struct {
	mu      sync.Mutex
	conn    net.Conn
	decoder *json.Decoder
	greeted bool
}

func newMonitor(socket *os.File) (*monitor, error) {
	conn, err := net.FileConn(socket)
	if err != nil {
		return nil, fmt.Errorf("monitor: %w", err)
	}
	return &monitor{conn: conn, decoder: json.NewDecoder(conn)}, nil
}

func (m *monitor) close() { m.conn.Close() }

// do runs one command to its end.
func (m *monitor) do(ctx context.Context, command string, args map[string]any) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { m.conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := m.greet()
	if err == nil {
		err = m.exchange(command, args)
	}
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return fmt.Errorf("monitor: %s: %w", command, err)
	}
	return nil
}

// greet reads the greeting and leaves negotiation, once.
func (m *monitor) greet() error {
	if m.greeted {
		return nil
	}
	var greeting struct{ QMP json.RawMessage }
	if err := m.decoder.Decode(&greeting); err != nil {
		return err
	}
	if err := m.exchange("qmp_capabilities", nil); err != nil {
		return err
	}
	m.greeted = true
	return nil
}

func (m *monitor) exchange(command string, args map[string]any) error {
	request := map[string]any{"execute": command}
	if args != nil {
		request["arguments"] = args
	}
	if err := json.NewEncoder(m.conn).Encode(request); err != nil {
		return err
	}
	for {
		var reply struct {
			Return json.RawMessage
			Error  *struct{ Class, Desc string }
		}
		if err := m.decoder.Decode(&reply); err != nil {
			return err
		}
		switch {
		case reply.Error != nil:
			return fmt.Errorf("%s: %s", reply.Error.Class, reply.Error.Desc)
		case reply.Return != nil:
			return nil
		}
	}
}
