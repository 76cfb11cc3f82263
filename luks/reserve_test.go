package luks

import (
	"errors"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pretended is a disk with reservations in memory. It answers as the kernel does: it
// reads the structures of linux/pr.h by their layout in bytes.
type pretended struct {
	registered []uint64
	holder     uint64
	self       uint64 // the key of this machine
	status     int    // an answer for every call instead
	err        error
}

func (p *pretended) reservation(command uintptr, argument unsafe.Pointer) (int, error) {
	if p.err != nil || p.status != 0 {
		return p.status, p.err
	}
	word := func(offset uintptr) uint64 { return *(*uint64)(unsafe.Add(argument, offset)) }
	half := func(offset uintptr) uint32 { return *(*uint32)(unsafe.Add(argument, offset)) }
	switch command {
	case 1<<30 | 24<<16 | 'p'<<8 | 200: // IOC_PR_REGISTER
		old, key, ignore := word(0), word(8), half(16) == 1
		if !ignore && old != p.self {
			return scsiConflict, nil
		}
		if p.registered = slices.DeleteFunc(p.registered, func(k uint64) bool { return k == p.self }); key != 0 {
			p.registered = append(p.registered, key)
		} else if p.holder == p.self {
			p.holder = 0
		}
		p.self = key
	case 1<<30 | 16<<16 | 'p'<<8 | 201: // IOC_PR_RESERVE
		if half(8) != 1 || half(12) != 0 || word(0) != p.self {
			return 0, unix.EINVAL
		}
		if p.holder != 0 && p.holder != p.self {
			return scsiConflict, nil
		}
		p.holder = p.self
	case 1<<30 | 16<<16 | 'p'<<8 | 202: // IOC_PR_RELEASE
		if word(0) == p.holder {
			p.holder = 0
		}
	case 1<<30 | 16<<16 | 'p'<<8 | 205: // IOC_PR_CLEAR
		if word(0) != p.self || half(8) != 0 {
			return scsiConflict, nil
		}
		p.registered, p.holder, p.self = nil, 0, 0
	default:
		return 0, unix.ENOTTY
	}
	return 0, nil
}

func TestAReservationIsHeldTakenOverAndGivenBack(t *testing.T) {
	p := &pretended{}
	must(t, reserve(p, 0xa))
	must(t, reserve(p, 0xa))
	if p.holder != 0xa || len(p.registered) != 1 {
		t.Errorf("disk is %+v", p)
	}
	must(t, unreserve(p, 0xa))
	if p.holder != 0 || len(p.registered) != 0 {
		t.Errorf("disk is %+v", p)
	}
	p.registered, p.holder = []uint64{0xb}, 0xb // another machine
	wantError(t, reserve(p, 0xa), ErrReserved)
	if len(p.registered) != 1 {
		t.Errorf("a registration is left: %+v", p)
	}
	must(t, clearAll(p, 0xa))
	must(t, reserve(p, 0xa))
	if p.holder != 0xa || slices.Contains(p.registered, 0xb) {
		t.Errorf("disk is %+v", p)
	}
	wantError(t, reserve(p, 0), ErrInvalid)
	wantError(t, clearAll(p, 0), ErrInvalid)
}

func TestADiskWithoutReservationsSaysSo(t *testing.T) {
	for _, c := range []struct {
		status int
		err    error
		want   error
	}{
		{0, unix.EOPNOTSUPP, ErrNoReservations}, {0, unix.ENOTTY, ErrNoReservations}, {scsiCheck, nil, ErrNoReservations},
		{scsiConflict, nil, ErrReserved}, {0x100 | scsiConflict, nil, ErrReserved}, {nvmeConflict, nil, ErrReserved}, {0, unix.EBADE, ErrReserved},
		{0, unix.EIO, ErrIO}, {0x28, nil, ErrIO},
	} {
		err := reserve(&pretended{status: c.status, err: c.err}, 1)
		wantError(t, err, c.want)
		for _, other := range []error{ErrNoReservations, ErrReserved, ErrIO} {
			if other != c.want && errors.Is(err, other) {
				t.Errorf("error is %v, and also %v", err, other)
			}
		}
	}
}
