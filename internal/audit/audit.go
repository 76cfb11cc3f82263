// Package audit is the log of decisions: append-only, one JSON object a line,
// each naming the SHA-256 of the line before it. An entry is on the disk before
// the decision takes effect.
//
// [Verify] proves that no entry in the middle was changed, removed or moved. A
// cut at the end leaves a shorter log that is whole in itself. What tells is kept
// elsewhere: a head, or a checkpoint of the Merkle tree over the same lines
// (package checkpoint), as each node keeps one. The format is specified in
// docs/spec/audit.md.
package audit

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/mod/sumdb/tlog"
	"golang.org/x/sys/unix"

	"github.com/keyagent/keyagent/internal/config"
)

// ErrBroken: the chain does not hold.
var ErrBroken = errors.New("audit log is not whole")

// maxLine bounds an entry in bytes.
const maxLine = 64 << 10

// Entry is one decision: who, what, why and with which result.
type Entry struct {
	Seq           uint64    `json:"seq"`
	Time          time.Time `json:"time"`
	Prev          string    `json:"prev"` // SHA-256 of the line before, 64 zeros at first
	Event         string    `json:"event"`
	CorrelationID string    `json:"correlation_id,omitempty"`
	Remote        string    `json:"remote,omitempty"`
	Identity      string    `json:"identity,omitempty"`
	Evidence      string    `json:"evidence,omitempty"` // SHA-256
	Volume        string    `json:"volume,omitempty"`
	Operation     string    `json:"operation,omitempty"`
	KeyVersion    uint32    `json:"key_version,omitempty"`
	Revision      uint64    `json:"revision,omitempty"` // of the volume's record
	Policy        string    `json:"policy,omitempty"`   // SHA-256
	Grant         string    `json:"grant,omitempty"`
	Profile       string    `json:"profile,omitempty"`
	RecordKey     string    `json:"record_key,omitempty"` // ID of the record MAC key
	Attempt       string    `json:"attempt,omitempty"`    // to create the volume
	Lease         string    `json:"lease,omitempty"`      // ID of the writer's
	Holder        string    `json:"holder,omitempty"`     // of the attempt or the lease
	Subject       string    `json:"subject,omitempty"`    // whom a word of revocation is of
	Word          uint64    `json:"word,omitempty"`       // its number
	Offline       string    `json:"offline,omitempty"`    // of openings without the key service
	Result        string    `json:"result"`               // allowed, refused, reported
	Class         string    `json:"class,omitempty"`
	Detail        string    `json:"detail,omitempty"`
	MAC           string    `json:"mac,omitempty"` // of what other key services may be told
}

// Head is the end of a chain.
type Head struct {
	Entries uint64
	Hash    string // of the last line
}

var genesis = Head{Hash: hex.EncodeToString(make([]byte, sha256.Size))}

// Log appends entries. It is safe for concurrent use; entries that arrive at
// the same time share one sync of the disk.
type Log struct {
	mu     sync.Mutex
	file   *os.File
	head   Head
	tree   *tree
	first  [sha256.Size]byte // hash of the first line
	now    func() time.Time
	broken error

	sync      sync.Mutex
	synced    atomic.Uint64 // entries known to be on the disk; the sync's holder sets it
	recovered int64
}

// Open opens or makes the log at path, verifies all of it, and hands each entry
// to visit, which may be nil. An unfinished last line, as a crash leaves it, was
// never acted upon and is cut off. Only one process may have a log open.
func Open(path string, now func() time.Time, visit func(Entry)) (*Log, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	l := &Log{file: f, now: now}
	// A log that was just made is nothing before its folder has it.
	if err := errors.Join(config.SyncDir(filepath.Dir(path)), l.load(visit)); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: %w", path, err), f.Close())
	}
	return l, nil
}

func (l *Log) load(visit func(Entry)) error {
	if err := unix.Flock(int(l.file.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return fmt.Errorf("another process has it open: %w", err)
	}
	w, err := read(l.file, visit)
	if err != nil {
		return err
	}
	whole := w.tree.end
	// What another process wrote, and was killed before it was on the disk, is counted as well.
	if err := l.file.Sync(); err != nil {
		return err
	}
	st, err := l.file.Stat()
	if err != nil {
		return err
	}
	if st.Size() > whole {
		if err := errors.Join(l.file.Truncate(whole), l.file.Sync()); err != nil {
			return err
		}
		l.recovered = st.Size() - whole
	}
	l.head, l.tree, l.first = w.Head, w.tree, w.First
	l.tree.log = l.file
	l.synced.Store(w.Entries)
	return nil
}

// Err returns why the log takes no more entries, or nil. It stays that way until
// the log is opened again.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.broken
}

// Recovered returns how many bytes of an unfinished entry Open cut off.
func (l *Log) Recovered() int64 { return l.recovered }

// Head returns the end of the chain.
func (l *Log) Head() Head {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.head
}

// Append writes e, whose Seq, Time and Prev it sets, and returns when it is on
// the disk. After an error nothing more is accepted.
func (l *Log) Append(e Entry) error {
	n, err := l.write(e)
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	l.sync.Lock()
	defer l.sync.Unlock()
	if l.synced.Load() >= n {
		return nil // somebody's sync came after this write
	}
	l.mu.Lock()
	written, broken := l.head.Entries, l.broken
	l.mu.Unlock()
	if broken != nil {
		// The kernel reports a failed sync once: a second one would succeed, and
		// the entry need not be there.
		return fmt.Errorf("audit: %w", broken)
	}
	if err := l.file.Sync(); err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.broken = err
		return fmt.Errorf("audit: %w", err)
	}
	l.synced.Store(written)
	return nil
}

func (l *Log) write(e Entry) (uint64, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.broken != nil {
		return 0, l.broken
	}
	e.Seq, e.Time, e.Prev = l.head.Entries+1, l.now().UTC(), l.head.Hash
	line, err := json.Marshal(e)
	if err != nil {
		return 0, err
	}
	if len(line) >= maxLine {
		e.Detail = e.Detail[:min(len(e.Detail), 1024)] + "…"
		if line, err = json.Marshal(e); err != nil || len(line) >= maxLine {
			return 0, errors.Join(fmt.Errorf("entry of %d bytes", len(line)), err)
		}
	}
	if _, err := l.file.Write(append(line, '\n')); err != nil {
		// Part of the line may be there: nothing can follow it.
		l.broken = err
		return 0, err
	}
	sum := sha256.Sum256(line)
	if e.Seq == 1 {
		l.first = sum
	}
	l.head = Head{e.Seq, hex.EncodeToString(sum[:])}
	l.tree.add(line)
	return e.Seq, nil
}

// First returns the SHA-256 of the first line. ok is false while there is none.
func (l *Log) First() (sum [sha256.Size]byte, ok bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first, l.head.Entries > 0
}

// Size returns how many entries are on the disk: what a crash cannot take back.
func (l *Log) Size() int64 { return int64(l.synced.Load()) }

// Root returns the root of the Merkle tree over the first entries. An error wraps [ErrBroken] if
// the log was changed below this process.
func (l *Log) Root(size int64) (tlog.Hash, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tree.rootAt(size)
}

// Consistency proves that the log of the larger size continues that of the smaller.
func (l *Log) Consistency(from, to int64) ([][]byte, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if from < 1 || to < from || to > l.tree.size {
		return nil, fmt.Errorf("no proof from %d entries to %d of %d", from, to, l.tree.size)
	}
	proof, err := tlog.ProveTree(to, from, l.tree)
	if err != nil {
		return nil, err
	}
	out := make([][]byte, len(proof))
	for i := range proof {
		out[i] = proof[i][:]
	}
	return out, nil
}

// Close syncs and closes the log.
func (l *Log) Close() error { return errors.Join(l.file.Sync(), l.file.Close()) }

// Whole is a log that was read to its end, and whose chain holds.
type Whole struct {
	Head
	First [sha256.Size]byte // SHA-256 of the first line; zeros if there is none
	tree  *tree
}

// Root returns the root of the Merkle tree over the first entries.
func (w *Whole) Root(size int64) (tlog.Hash, error) { return w.tree.rootAt(size) }

// Verify reads a log to its end and proves the chain. An unfinished last line is an error
// here. The result reads from the log again.
func Verify(log io.ReaderAt, visit func(Entry)) (*Whole, error) {
	counted := &counter{r: io.NewSectionReader(log, 0, math.MaxInt64)}
	w, err := read(counted, visit)
	w.tree.log = log
	if err == nil && counted.n != w.tree.end {
		err = fmt.Errorf("%w: %d bytes after entry %d are not a whole line", ErrBroken, counted.n-w.tree.end, w.Entries)
	}
	return w, err
}

type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// read goes as far as there are whole lines. What it returns is never nil.
func read(r io.Reader, visit func(Entry)) (*Whole, error) {
	w := &Whole{Head: genesis, tree: &tree{}}
	br := bufio.NewReaderSize(r, maxLine)
	for {
		line, err := br.ReadSlice('\n')
		if errors.Is(err, io.EOF) {
			return w, nil
		}
		if err != nil {
			return w, fmt.Errorf("%w: after entry %d: %w", ErrBroken, w.Entries, err)
		}
		line = line[:len(line)-1]
		e, err := parse(line)
		switch {
		case err != nil:
			return w, fmt.Errorf("%w: entry %d: %w", ErrBroken, w.Entries+1, err)
		case e.Seq != w.Entries+1:
			return w, fmt.Errorf("%w: entry %d stands where %d should", ErrBroken, e.Seq, w.Entries+1)
		case e.Prev != w.Hash:
			return w, fmt.Errorf("%w: entry %d does not follow from the one before it", ErrBroken, e.Seq)
		}
		sum := sha256.Sum256(line)
		if e.Seq == 1 {
			w.First = sum
		}
		w.Head = Head{e.Seq, hex.EncodeToString(sum[:])}
		w.tree.add(line)
		if visit != nil {
			visit(e)
		}
	}
}

func parse(line []byte) (Entry, error) {
	var e Entry
	d := json.NewDecoder(bytes.NewReader(line))
	d.DisallowUnknownFields()
	if err := d.Decode(&e); err != nil {
		return e, err
	}
	// Not More, which takes a closing bracket for an end.
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return e, errors.New("something follows the object on the line")
	}
	return e, nil
}
