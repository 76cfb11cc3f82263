// Package cryptmapper lets a CSI driver encrypt its volumes: it opens, grows and closes
// them through keyagent's agent on the same node. The driver never has a key, and needs
// neither cryptsetup nor a privilege of its own for it.
//
// The methods have the shape that Constellation's CSI drivers call, so that a driver of
// that kind changes its import and how it makes a [CryptMapper]. What differs: who may
// open which volume on which device is the agent's configuration (callers and dynamic, in
// docs/configuration.md), and a volume is created only where [Options] say so, on a device
// that is blank, once. Each call may be repeated, also after a crash of either side.
package cryptmapper

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// DefaultSocket is where the agent listens unless its configuration says otherwise.
const DefaultSocket = "/run/keyagent/agent.sock"

// prefix of the devices that volumes are mapped to.
const prefix = "/dev/mapper/"

// callTimeout bounds calls whose shape has no context.
const callTimeout = 2 * time.Minute

var (
	// ErrIntegrity means that a volume has no integrity, and was opened with it in mind.
	ErrIntegrity = errors.New("the volume has no integrity")
	// ErrNotOpen means that a volume is not mapped.
	ErrNotOpen = errors.New("the volume is not open")
)

// Options say what a driver wants of the agent.
type Options struct {
	// Create lets Open create a volume that does not exist, if its device is blank. The
	// caller needs the operation format, and a rule of dynamic that has it. Default: only
	// volumes that exist are opened.
	Create bool
	// Discards passes TRIM through, if the rule has it, which tells the host what is unused.
	Discards bool
}

// CryptMapper opens volumes through the agent. It is safe for concurrent use.
type CryptMapper struct {
	node nodev1.NodeClient
	opts Options
	conn *grpc.ClientConn // nil unless Dial made it
}

// New uses a connection to the agent that the caller has.
func New(node nodev1.NodeClient, opts Options) *CryptMapper {
	return &CryptMapper{node: node, opts: opts}
}

// Dial uses the agent that listens on a unix socket, such as [DefaultSocket]. It connects
// with the first call, and again when the agent was restarted. The caller closes it.
func Dial(socket string, opts Options) (*CryptMapper, error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(unixsocket.Credentials(nil)))
	if err != nil {
		return nil, err
	}
	return &CryptMapper{nodev1.NewNodeClient(conn), opts, conn}, nil
}

// Close ends the connection that [Dial] made. Volumes stay open.
func (c *CryptMapper) Close() error {
	if c.conn == nil {
		return nil
	}
	return c.conn.Close()
}

// OpenCryptDevice opens a volume on the block device source, and returns the device on
// which its plaintext is: a filesystem, if any, is the driver's. An empty source stands for
// that of a volume which the agent's configuration names. A volume that is open already is
// the same device. With integrity what is on it is authenticated; a volume that was made
// without is refused.
func (c *CryptMapper) OpenCryptDevice(ctx context.Context, source, volumeID string, integrity bool) (string, error) {
	r := &nodev1.OpenRequest{Id: volumeID, Format: c.opts.Create}
	if source != "" {
		if integrity {
			r.Integrity = "hmac-sha256"
		}
		r.Device, r.Filesystem, r.Discards = source, "none", c.opts.Discards
	}
	if integrity {
		// An older agent would make a volume without, for good.
		var header metadata.MD
		_, err := c.node.Status(ctx, &nodev1.StatusRequest{Id: volumeID}, grpc.Header(&header))
		if err != nil && status.Code(err) != codes.NotFound {
			return "", failed("open", volumeID, err)
		}
		if !nodev1.Has(header, nodev1.FeatureIntegrity) {
			return "", failed("open", volumeID, fmt.Errorf("%w: the agent is older than this program", ErrIntegrity))
		}
	}
	resp, err := c.node.Open(ctx, r)
	if err != nil {
		return "", failed("open", volumeID, err)
	}
	if integrity && resp.GetVolume().GetIntegrity() == "" {
		// A configured one.
		return "", failed("open", volumeID, ErrIntegrity)
	}
	return mapped("open", volumeID, resp.GetVolume())
}

// ResizeCryptDevice grows an open volume to the size that its device has now, and returns
// the device with its plaintext. Growing what has that size succeeds.
func (c *CryptMapper) ResizeCryptDevice(ctx context.Context, volumeID string) (string, error) {
	volumeID = strings.TrimPrefix(volumeID, prefix)
	resp, err := c.node.Resize(ctx, &nodev1.ResizeRequest{Id: volumeID})
	if err != nil {
		return "", failed("resize", volumeID, err)
	}
	return mapped("resize", volumeID, resp.GetVolume())
}

// CloseCryptDevice closes a volume. Closing one that is closed, or that the agent never
// heard of, succeeds. Nothing may use it any more.
func (c *CryptMapper) CloseCryptDevice(volumeID string) error {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	volumeID = strings.TrimPrefix(volumeID, prefix)
	_, err := c.node.Close(ctx, &nodev1.CloseRequest{Id: volumeID})
	if err != nil && status.Code(err) != codes.NotFound {
		return failed("close", volumeID, err)
	}
	return nil
}

// GetDevicePath returns the device on which the ciphertext of an open volume is, as it was
// given when the volume was opened. The ID may have /dev/mapper/ before it.
func (c *CryptMapper) GetDevicePath(volumeID string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), callTimeout)
	defer cancel()
	volumeID = strings.TrimPrefix(volumeID, prefix)
	resp, err := c.node.Status(ctx, &nodev1.StatusRequest{Id: volumeID})
	if err != nil {
		return "", failed("find", volumeID, err)
	}
	if _, err := mapped("find", volumeID, resp.GetVolume()); err != nil {
		return "", err
	}
	return resp.GetVolume().GetDevice(), nil
}

func mapped(verb, id string, v *nodev1.Volume) (string, error) {
	if v.GetMapped() == "" {
		return "", failed(verb, id, ErrNotOpen)
	}
	return v.GetMapped(), nil
}

// failed says what went wrong and what to do. It wraps what gRPC returned, so that a driver
// can pass the code on.
func failed(verb, id string, err error) error {
	hint := ""
	if _, ok := status.FromError(err); ok {
		if hint = failure.Of(failure.FromStatus(err)).Hint; hint != "" {
			hint = " (hint: " + hint + ")"
		}
	}
	return fmt.Errorf("%s volume %.128q: %w%s", verb, id, err, hint)
}
