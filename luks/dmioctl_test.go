package luks

import (
	"encoding/binary"
	"slices"
	"strings"
	"testing"
)

// nameList is the kernel's answer for mappings of the given names.
func nameList(names ...string) []byte {
	ne := binary.NativeEndian
	buf := make([]byte, dmBufferSize)
	ne.PutUint32(buf[offDMStart:], dmHeaderSize)
	at := dmHeaderSize
	for i, name := range names {
		size := (12 + len(name) + 1 + 7) &^ 7
		ne.PutUint64(buf[at:], 254<<8|uint64(i)+1)
		if i < len(names)-1 {
			ne.PutUint32(buf[at+8:], uint32(size))
		}
		copy(buf[at+12:], name)
		at += size
	}
	return buf
}

func TestTheListOfMappingsIsRead(t *testing.T) {
	for _, want := range [][]string{nil, {"data"}, {"data", "a-longer-name", "x"}} {
		got, err := parseNames(nameList(want...))
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("names are %q, %v, want %q", got, err, want)
		}
	}
	circle := nameList("data")
	binary.NativeEndian.PutUint32(circle[dmHeaderSize+8:], 4)
	far := nameList("data")
	binary.NativeEndian.PutUint32(far[dmHeaderSize+8:], 1<<31)
	for _, answer := range [][]byte{circle, far, nameList("data")[:dmHeaderSize+4]} {
		if _, err := parseNames(answer); err == nil {
			t.Error("a list that is malformed was read")
		}
	}
}

// FuzzNames: no answer of the device-mapper makes the reader panic or run for ever.
func FuzzNames(f *testing.F) {
	f.Add(nameList("data", "logs"))
	f.Add(nameList())
	f.Add(make([]byte, dmHeaderSize))
	f.Fuzz(func(t *testing.T, answer []byte) {
		buf := make([]byte, dmBufferSize)
		copy(buf, answer)
		names, err := parseNames(buf)
		if err != nil {
			wantError(t, err, ErrTableMismatch)
		}
		if len(names) > dmBufferSize/12 {
			t.Errorf("%d names", len(names))
		}
	})
}

func TestATableThatIsWrittenIsTheOneThatIsAccepted(t *testing.T) {
	for _, opts := range []OpenOptions{{}, {AllowDiscards: true}, {Workqueues: true}, {ReadOnly: true, AllowDiscards: true, Workqueues: true}} {
		params := cryptParams(plain, plain.volumeKeyRef(idData.UUID), DevNum{7, 0}, dataOffset, opts)
		m, err := parseLive(liveAnswer("uuid", 8192, "crypt", params))
		must(t, err)
		m.readOnly = opts.ReadOnly
		got, err := checkTable(m, "data", idData.UUID)
		must(t, err)
		if got.options() != opts || got.Bytes != 4<<20 {
			t.Errorf("mapping is %+v of %q", got, params)
		}
	}
	spec := target(8192, "crypt", "params")
	if len(spec)%8 != 0 || !strings.HasPrefix(string(spec[dmSpecSize:]), "params\x00") {
		t.Errorf("target is %q", spec)
	}
}

// A suspended mapping has random bytes where its key was: they are neither compared
// nor shown.
func TestASuspendedTableIsReadWithoutItsKey(t *testing.T) {
	params := strings.Replace(goodParams, ":64:logon:cryptsetup:6f1d3a52-1c6b-4f0c-9a53-0d8a4a6b7c11-d0", strings.Repeat("5e", 64), 1)
	answer := liveAnswer("uuid", 8192, "crypt", params)
	m, err := parseLive(answer)
	must(t, err)
	_, err = checkTable(m, "data", idData.UUID)
	wantError(t, err, ErrTableMismatch)
	binary.NativeEndian.PutUint32(answer[offDMFlags:], dmActivePresent|dmSuspended)
	m, err = parseLive(answer)
	must(t, err)
	got, err := checkTable(m, "data", idData.UUID)
	if err != nil || !got.Suspended {
		t.Errorf("mapping is %+v, %v", got, err)
	}
}
