package tdx

import (
	"fmt"
	"io/fs"
	"os"

	"github.com/google/go-tdx-guest/client"
	"github.com/google/go-tdx-guest/client/linuxabi"
)

func checkDevice(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Mode()&fs.ModeCharDevice == 0 {
		return fmt.Errorf("%s is not a character device", path)
	}
	return nil
}

// quoteByDevice has the library send a TD report to the quoting service through
// the driver.
func quoteByDevice(path string, data [64]byte) ([]byte, error) {
	d := &client.LinuxDevice{}
	if err := d.Open(path); err != nil {
		return nil, err
	}
	defer d.Close()
	return client.GetRawQuote(bounded{d}, data)
}

// bounded refuses a length that the host wrote and the library would slice by.
type bounded struct{ client.Device }

func (b bounded) Ioctl(command uintptr, request any) (uintptr, error) {
	result, err := b.Device.Ioctl(command, request)
	if q, ok := request.(*linuxabi.TdxQuoteReq); ok && err == nil {
		if h, ok := q.Buffer.(*linuxabi.TdxQuoteHdr); ok && h.OutLen > linuxabi.ReqBufSize {
			return 0, fmt.Errorf("the host says that the quote has %d bytes", h.OutLen)
		}
	}
	return result, err
}
