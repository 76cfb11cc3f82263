package audit

import (
	"bytes"
	"fmt"
	"io"

	"golang.org/x/mod/sumdb/tlog"
)

// blockLevel is the level of the tree from which on its hashes are in memory: one for each 256
// entries, and fewer above. Those below are computed again from the log when a proof needs
// them, so that a log of ten million entries takes three megabytes of memory.
const (
	blockLevel = 8
	blockSize  = 1 << blockLevel
)

// tree is the Merkle tree of RFC 6962 over the lines of a log, without their newlines. It is
// not safe for concurrent use.
type tree struct {
	log    io.ReaderAt   // the lines; read again for old entries
	end    int64         // of the lines, in bytes
	size   int64         // entries
	starts []int64       // where each block begins in the log
	tops   [][]tlog.Hash // by level, from blockLevel on
	last   []tlog.Hash   // entries of the block that is not full
}

func (t *tree) add(line []byte) {
	if len(t.last) == 0 {
		t.starts = append(t.starts, t.end)
	}
	t.last = append(t.last, tlog.RecordHash(line))
	t.size++
	t.end += int64(len(line)) + 1
	if len(t.last) < blockSize {
		return
	}
	h := top(t.last)
	t.last = t.last[:0]
	for i := 0; ; i++ {
		if i == len(t.tops) {
			t.tops = append(t.tops, nil)
		}
		t.tops[i] = append(t.tops[i], h)
		n := len(t.tops[i])
		if n%2 == 1 {
			return
		}
		h = tlog.NodeHash(t.tops[i][n-2], t.tops[i][n-1])
	}
}

// top is the hash over 2^n entries.
func top(entries []tlog.Hash) tlog.Hash {
	if len(entries) == 1 {
		return entries[0]
	}
	half := len(entries) / 2
	return tlog.NodeHash(top(entries[:half]), top(entries[half:]))
}

// rootAt is the hash over the first entries.
func (t *tree) rootAt(size int64) (tlog.Hash, error) {
	if size < 1 || size > t.size {
		return tlog.Hash{}, fmt.Errorf("no root over %d of %d entries", size, t.size)
	}
	return tlog.TreeHash(size, t)
}

// ReadHashes implements tlog.HashReader.
func (t *tree) ReadHashes(indexes []int64) ([]tlog.Hash, error) {
	out := make([]tlog.Hash, len(indexes))
	read, block := []tlog.Hash(nil), int64(-1)
	for i, index := range indexes {
		level, n := tlog.SplitStoredHashIndex(index)
		if level >= blockLevel {
			if level-blockLevel >= len(t.tops) || n >= int64(len(t.tops[level-blockLevel])) {
				return nil, fmt.Errorf("the tree of %d entries has no hash %d of level %d", t.size, n, level)
			}
			out[i] = t.tops[level-blockLevel][n]
			continue
		}
		first := n << level
		if first>>blockLevel != block {
			block = first >> blockLevel
			var err error
			if read, err = t.block(block); err != nil {
				return nil, err
			}
		}
		at := first - block<<blockLevel
		if at+1<<level > int64(len(read)) {
			return nil, fmt.Errorf("the tree of %d entries has no hash %d of level %d", t.size, n, level)
		}
		out[i] = top(read[at : at+1<<level])
	}
	return out, nil
}

// block returns the hashes of the entries of one block.
func (t *tree) block(n int64) ([]tlog.Hash, error) {
	full := t.size >> blockLevel
	switch {
	case n == full:
		return t.last, nil
	case n > full:
		return nil, fmt.Errorf("the tree of %d entries has no block %d", t.size, n)
	}
	end := t.end
	if n+1 < int64(len(t.starts)) {
		end = t.starts[n+1]
	}
	data := make([]byte, end-t.starts[n])
	if _, err := t.log.ReadAt(data, t.starts[n]); err != nil {
		return nil, fmt.Errorf("%w: entries %d and on: %w", ErrBroken, n<<blockLevel+1, err)
	}
	out := make([]tlog.Hash, 0, blockSize)
	for line := range bytes.Lines(data) {
		out = append(out, tlog.RecordHash(bytes.TrimSuffix(line, []byte("\n"))))
	}
	if len(out) != blockSize || top(out) != t.tops[0][n] {
		return nil, fmt.Errorf("%w: entries %d to %d were changed since they were read", ErrBroken, n<<blockLevel+1, (n+1)<<blockLevel)
	}
	return out, nil
}
