package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/google/go-eventlog/tcg"
)

var (
	// ErrMalformed means that the bytes are no event log.
	ErrMalformed = errors.New("malformed")
	// ErrBank means that the log has no digests of the hash that is asked for.
	ErrBank = errors.New("the log has no digests of this bank")
)

// Bank is a hash by the TPM's number of it.
type Bank uint16

const (
	SHA1   Bank = 0x0004
	SHA256 Bank = 0x000B
	SHA384 Bank = 0x000C
)

var banks = map[Bank]struct {
	name string
	size int
}{
	SHA1: {"SHA-1", 20}, SHA256: {"SHA-256", 32}, SHA384: {"SHA-384", 48},
	0x000D: {"SHA-512", 64}, 0x0012: {"SM3", 32},
}

// String is the bank's name.
func (b Bank) String() string {
	if k, ok := banks[b]; ok {
		return k.name
	}
	return fmt.Sprintf("bank %#x", uint16(b))
}

const (
	// maxBanks bounds the digests of one event. Firmware has at most five.
	maxBanks = 16
	// noRegister is the index of an EV_NO_ACTION event that is about no register.
	// As the index of any other event it is padding.
	noRegister = 0xffffffff
)

// Parse reads the crypto-agile log of UEFI firmware (TCG PC Client Platform
// Firmware Profile 1.06, section 10) of at most maxEvents events, and returns the
// events with their digests of one bank. An event that has none of that bank has
// an empty digest. Padding of 0xff ends a log.
//
// The first event, which says what the log is, is not among them: an event's
// place in the slice plus one is its number.
func Parse(log []byte, bank Bank, maxEvents int) ([]tcg.Event, error) {
	c := &cursor{rest: log}
	c.take(4) // register
	first := c.u32()
	c.take(20) // SHA-1
	head := c.data()
	if c.short {
		return nil, fmt.Errorf("%w: %d bytes are no event log", ErrMalformed, len(log))
	}
	sizes, err := parseHead(first, head)
	if err != nil {
		return nil, err
	}
	if sizes == nil {
		return nil, fmt.Errorf("%w: it is of the old form and has SHA-1 alone (hint: enable the %s bank of the TPM in the firmware's setup)", ErrBank, bank)
	}
	if sizes[bank] == 0 {
		var has []string
		for b := range sizes {
			has = append(has, b.String())
		}
		slices.Sort(has)
		return nil, fmt.Errorf("%w: it has %s, not %s (hint: enable the %s bank of the TPM in the firmware's setup)",
			ErrBank, strings.Join(has, " and "), bank, bank)
	}
	var out []tcg.Event
	for len(c.rest) > 0 {
		e, padding, err := c.event(sizes, bank)
		if err != nil {
			return nil, fmt.Errorf("%w: event #%d: %w", ErrMalformed, len(out)+1, err)
		}
		if padding {
			break
		}
		if len(out) == maxEvents {
			return nil, fmt.Errorf("%w: more than %d events", ErrMalformed, maxEvents)
		}
		out = append(out, e)
	}
	return out, nil
}

// parseHead returns the size of each bank's digest, or nil for a log of the form
// that TPM 1.2 had, which has no head.
func parseHead(kind uint32, data []byte) (map[Bank]int, error) {
	rest, ok := bytes.CutPrefix(data, []byte("Spec ID Event03\x00"))
	if kind != uint32(tcg.NoAction) || !ok {
		return nil, nil
	}
	c := &cursor{rest: rest}
	c.take(4 + 4) // platform class; versions and the size of a word
	n := c.u32()
	if c.short || n == 0 || n > maxBanks {
		return nil, fmt.Errorf("%w: its head names %d banks", ErrMalformed, n)
	}
	sizes := map[Bank]int{}
	for range n {
		bank, size := Bank(c.u16()), int(c.u16())
		if c.short {
			return nil, fmt.Errorf("%w: its head is cut", ErrMalformed)
		}
		known, ok := banks[bank]
		if size == 0 || size > 64 || (ok && size != known.size) || sizes[bank] != 0 {
			return nil, fmt.Errorf("%w: its head says %s twice, or of %d bytes", ErrMalformed, bank, size)
		}
		sizes[bank] = size
	}
	return sizes, nil
}

func (c *cursor) event(sizes map[Bank]int, bank Bank) (e tcg.Event, padding bool, err error) {
	index, kind := c.u32(), c.u32()
	if !c.short && index == noRegister && kind != uint32(tcg.NoAction) {
		return e, true, nil
	}
	n := c.u32()
	if c.short || n > maxBanks {
		return e, false, fmt.Errorf("cut, or with %d digests", n)
	}
	// An int of 32 bits would be negative.
	e.Index, e.Type = int(int64(index)), tcg.EventType(kind)
	var seen []Bank
	for range n {
		b := Bank(c.u16())
		if c.short || sizes[b] == 0 || slices.Contains(seen, b) {
			return e, false, fmt.Errorf("cut, or with a digest that its head does not name, or twice: %s", b)
		}
		seen = append(seen, b)
		digest := c.take(sizes[b])
		if b == bank {
			e.Digest = digest
		}
	}
	e.Data = c.data()
	if c.short {
		return e, false, errors.New("cut")
	}
	return e, false, nil
}

// cursor reads numbers in little-endian order. Once it is short, it reads zeros.
type cursor struct {
	rest  []byte
	short bool
}

func (c *cursor) take(n int) []byte {
	if c.short || n < 0 || n > len(c.rest) {
		c.short, c.rest = true, nil
		return nil
	}
	out := c.rest[:n:n]
	c.rest = c.rest[n:]
	return out
}

func (c *cursor) u16() uint16 {
	b := c.take(2)
	if b == nil {
		return 0
	}
	return binary.LittleEndian.Uint16(b)
}

func (c *cursor) u32() uint32 {
	b := c.take(4)
	if b == nil {
		return 0
	}
	return binary.LittleEndian.Uint32(b)
}

func (c *cursor) u64() uint64 {
	b := c.take(8)
	if b == nil {
		return 0
	}
	return binary.LittleEndian.Uint64(b)
}

// data reads a length of 32 bits, and as many bytes.
func (c *cursor) data() []byte {
	n := c.u32()
	if int64(n) > int64(len(c.rest)) {
		c.short, c.rest = true, nil
		return nil
	}
	return c.take(int(n))
}
