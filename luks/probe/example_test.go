package probe_test

import (
	"fmt"
	"os"

	"github.com/keyagent/keyagent/luks/probe"
)

// What libblkid knows of a device is something that somebody may miss.
func ExampleDevice() {
	f, err := os.CreateTemp("", "disk")
	if err != nil {
		fmt.Println(err)
		return
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if err := f.Truncate(1 << 20); err != nil {
		fmt.Println(err)
		return
	}
	for at, data := range map[int64]string{1024: "\x01\x00\x00\x00\xff\x00\x00\x00", 4096 - 10: "SWAPSPACE2"} {
		if _, err := f.WriteAt([]byte(data), at); err != nil {
			fmt.Println(err)
			return
		}
	}
	found, err := probe.Device(int(f.Fd()))
	if err != nil {
		fmt.Println(err)
		return
	}
	for _, s := range found {
		fmt.Println(s.Type, "at", s.Offset)
	}
	// Output: swap at 4086
}
