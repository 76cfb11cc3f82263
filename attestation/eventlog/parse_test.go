package eventlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/google/go-eventlog/register"
	"github.com/google/go-eventlog/tcg"
)

type entry struct {
	register, kind uint32
	banks          []Bank
	data           []byte
}

func head(banked ...Bank) []byte {
	data := append([]byte("Spec ID Event03\x00"), 0, 0, 0, 0, 0, 2, 0, 2)
	data = append(data, le32(uint32(len(banked)))...)
	for _, b := range banked {
		data = binary.LittleEndian.AppendUint16(data, uint16(b))
		data = binary.LittleEndian.AppendUint16(data, uint16(banks[b].size))
	}
	data = append(data, 0)
	return bytes.Join([][]byte{le32(0, 3), make([]byte, 20), le32(uint32(len(data))), data}, nil)
}

func join(head []byte, entries ...entry) []byte {
	out := bytes.Clone(head)
	for _, e := range entries {
		out = append(out, le32(e.register, e.kind, uint32(len(e.banks)))...)
		for _, b := range e.banks {
			out = binary.LittleEndian.AppendUint16(out, uint16(b))
			out = append(out, bytes.Repeat([]byte{byte(b)}, banks[b].size)...)
		}
		out = append(append(out, le32(uint32(len(e.data)))...), e.data...)
	}
	return out
}

func TestALogIsReadInOneBank(t *testing.T) {
	both := []Bank{SHA1, SHA256}
	log := join(head(both...),
		entry{0, uint32(tcg.SCRTMVersion), both, []byte("1")},
		entry{noRegister, uint32(tcg.NoAction), both, []byte("SP800-155 Event3")},
		entry{7, uint32(tcg.Separator), []Bank{SHA1}, make([]byte, 4)},
		entry{4, uint32(tcg.Separator), both, make([]byte, 4)})
	events, err := Parse(append(log, bytes.Repeat([]byte{0xff}, 100)...), SHA256, 10)
	if err != nil || len(events) != 4 {
		t.Fatal(len(events), err)
	}
	if events[0].Digest[0] != 0x0b || events[2].Digest != nil || events[3].Index != 4 {
		t.Errorf("%+v", events)
	}
	if _, err := Parse(log, SHA256, 3); !errors.Is(err, ErrMalformed) {
		t.Errorf("too many events: %v", err)
	}
	for n := range len(log) {
		if _, err := Parse(log[:n], SHA256, 10); err == nil && n > 0 && len(log)-n < 20 {
			t.Errorf("a log that is cut after %d of %d bytes is taken", n, len(log))
		}
	}
}

func TestALogWithoutTheBankNamesTheBanksThatItHas(t *testing.T) {
	old := append(le32(4, uint32(tcg.Separator)), make([]byte, 20)...)
	old = append(append(old, le32(4)...), 0, 0, 0, 0)
	for _, c := range []struct {
		name string
		log  []byte
		want []string
	}{
		{"SHA-1 alone, in the old form", old, []string{"SHA-1 alone", "enable the SHA-256 bank"}},
		{"SHA-1 alone", head(SHA1), []string{"SHA-1, not SHA-256", "enable the SHA-256 bank"}},
		{"SHA-384", head(SHA1, SHA384), []string{"SHA-1 and SHA-384, not SHA-256", "enable the SHA-256 bank"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, err := Parse(c.log, SHA256, 10)
			if !errors.Is(err, ErrBank) {
				t.Fatal(err)
			}
			for _, text := range c.want {
				if !strings.Contains(err.Error(), text) {
					t.Errorf("%v does not say %q", err, text)
				}
			}
		})
	}
}

func TestWhatIsNoLogIsRefused(t *testing.T) {
	for name, log := range map[string][]byte{
		"nothing":                   nil,
		"text":                      []byte("a text that is long enough to have a header"),
		"no banks":                  head(),
		"a bank twice":              head(SHA256, SHA256),
		"a digest that no head has": join(head(SHA256), entry{0, 8, []Bank{SHA384}, nil}),
		"a digest twice":            join(head(SHA256), entry{0, 8, []Bank{SHA256, SHA256}, nil}),
	} {
		if _, err := Parse(log, SHA256, 10); !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrBank) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Where both take a log, Google's parser and ours see the same events.
func FuzzParse(f *testing.F) {
	f.Add(head(SHA1, SHA256))
	f.Add(join(head(SHA1, SHA256), entry{0, 8, []Bank{SHA1, SHA256}, []byte("1")}, entry{noRegister, 3, []Bank{SHA256}, nil}, entry{7, 4, []Bank{SHA256}, make([]byte, 4)}))
	f.Fuzz(func(t *testing.T, log []byte) {
		ours, err := Parse(log, SHA256, 100)
		if err != nil {
			if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrBank) {
				t.Fatal(err)
			}
			return
		}
		for i, e := range ours {
			Describe(i, e)
		}
		parsed, err := tcg.ParseEventLog(log, tcg.ParseOpts{AllowPadding: true})
		if err != nil {
			return
		}
		theirs := parsed.Events(register.HashSHA256)
		for i, e := range ours {
			// Theirs ends at an event of no register.
			if uint32(e.Index) == noRegister || i >= len(theirs) {
				return
			}
			if e.Digest == nil {
				return // theirs takes another digest
			}
			if theirs[i].Index != e.Index || theirs[i].Type != e.Type || !bytes.Equal(theirs[i].Digest, e.Digest) || !bytes.Equal(theirs[i].Data, e.Data) {
				t.Fatalf("event %d: %+v, theirs %+v", i, e, theirs[i])
			}
		}
	})
}
