package systemd_test

import (
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/systemd"
)

// An error that somebody else worded is a status, and says nothing else to systemd.
func TestAnErrorIsNoWordToSystemd(t *testing.T) {
	socket := &net.UnixAddr{Name: filepath.Join(t.TempDir(), "n"), Net: "unixgram"}
	manager, err := net.ListenUnixgram("unixgram", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	t.Setenv("NOTIFY_SOCKET", socket.Name)
	n := systemd.NewNotifier()
	said := func() string {
		t.Helper()
		buf := make([]byte, 4096)
		if err := manager.SetReadDeadline(time.Now().Add(10 * time.Second)); err != nil {
			t.Fatal(err)
		}
		size, err := manager.Read(buf)
		if err != nil {
			t.Fatal(err)
		}
		return string(buf[:size])
	}
	const evil = "refused\nREADY=1\r\n\tMAINPID=1\x1b[2J"
	n.Status(evil)
	if got := said(); got != "STATUS=refused READY=1 MAINPID=1 [2J" {
		t.Errorf("%q", got)
	}
	n.Waiting(evil, time.Minute)
	if got := said(); got != "STATUS=refused READY=1 MAINPID=1 [2J\nEXTEND_TIMEOUT_USEC=120000000" {
		t.Errorf("%q", got)
	}
	n.Status(evil) // stands there already
	n.Status(strings.Repeat("ä", 1000))
	if got := said(); len(got) > 600 || !strings.HasSuffix(got, "ä…") {
		t.Errorf("%q", got)
	}
}
