package keyservice

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"sync"

	"github.com/keyagent/keyagent/internal/audit"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/volume"
)

// epochs begins epochs, see [volume.Seen]. All replicas follow one that begins one. So it is
// not for who writes the disk of one of them to say: the entry in the audit log has a MAC.
type epochs struct {
	key     *secret.Bytes
	volumes *volume.Store
	audit   *audit.Log

	mu sync.Mutex
}

// epochKey is what the key of the MAC is derived for.
const epochKey = "keyagent epoch key v1"

// openEpoch takes the epoch that the audit log has, and begins one if an operator gave up all
// records at this start.
func openEpoch(records *macstore.Store, volumes *volume.Store, opts Options) (*epochs, error) {
	key, err := records.Derive(epochKey, sha256.Size)
	if err != nil {
		return nil, err
	}
	e := &epochs{key: key, volumes: volumes, audit: opts.Audit}
	if opts.Epoch > 0 {
		want, err := e.mac(opts.Epoch)
		switch {
		case err != nil:
			return nil, err
		case hmac.Equal([]byte(want), []byte(opts.EpochMAC)):
			volumes.BeginEpoch(opts.Epoch)
		default:
			opts.Log.Error("the audit log says that all records were given up, and no key service of these records wrote that", "epoch", opts.Epoch)
		}
	}
	if !opts.InitRecords {
		return e, nil
	}
	// By the clock: it is later than that of a replica which this log knows nothing of.
	now := uint64(max(0, opts.Now().Unix()))
	return e, e.begin(max(volumes.Epoch()+1, now), nil, audit.Entry{Detail: "by an operator's word"})
}

// begin makes an epoch that is later than the present one the present one, in the audit log
// before anything is forgotten. say, if not nil, is called then.
func (e *epochs) begin(epoch uint64, say func(), entry audit.Entry) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if epoch <= e.volumes.Epoch() {
		return nil
	}
	mac, err := e.mac(epoch)
	if err != nil {
		return err
	}
	entry.Event, entry.Revision, entry.Result, entry.MAC = initRecords, epoch, "allowed", mac
	if say != nil {
		say()
	}
	if err := e.audit.Append(entry); err != nil {
		return err
	}
	e.volumes.BeginEpoch(epoch)
	return nil
}

func (e *epochs) mac(epoch uint64) (mac string, err error) {
	sum := make([]byte, sha256.Size)
	message := binary.BigEndian.AppendUint64(nil, epoch)
	err = e.key.Use(func(k []byte) error {
		secret.Do(func() {
			h := hmac.New(sha256.New, k)
			h.Write(message)
			h.Sum(sum[:0])
		})
		return nil
	})
	return hex.EncodeToString(sum), err
}

// Close wipes the key.
func (e *epochs) Close() error { return e.key.Close() }
