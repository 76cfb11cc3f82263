package systemd_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/keyagent/keyagent/systemd"
)

// A service says when it is ready. Where systemd did not start it, nobody is told.
func ExampleNotifier() {
	dir, err := os.MkdirTemp("", "notify")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.RemoveAll(dir)
	// What systemd does for a unit of Type=notify.
	socket := &net.UnixAddr{Name: filepath.Join(dir, "socket"), Net: "unixgram"}
	manager, err := net.ListenUnixgram("unixgram", socket)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer manager.Close()
	os.Setenv("NOTIFY_SOCKET", socket.Name)
	defer os.Unsetenv("NOTIFY_SOCKET")

	systemd.NewNotifier().Ready("2 volumes open")

	message := make([]byte, 100)
	n, err := manager.Read(message)
	fmt.Println(string(message[:n]), err)
	// Output:
	// READY=1
	// STATUS=2 volumes open <nil>
}
