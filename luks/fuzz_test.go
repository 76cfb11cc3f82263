package luks

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
)

// FuzzHeaderJSON: whatever text is accepted says, to an independent and lax
// parser, exactly what a header of ours says, but for its salts and its digest.
func FuzzHeaderJSON(f *testing.F) {
	good := header(f)
	f.Add([]byte(forgery{f, good}.json()))
	for _, h := range hostileHeaders {
		f.Add([]byte(forgery{f, h.forge(f, good)}.json()))
	}
	want := meaning(f, []byte(forgery{f, good}.json()))
	f.Fuzz(func(t *testing.T, text []byte) {
		root, err := parseJSON(text)
		if err == nil {
			err = plain.whitelist.check("", root)
		}
		if err != nil {
			wantError(t, err, ErrHeaderRefused)
			return
		}
		if got := meaning(t, text); !reflect.DeepEqual(got, want) {
			t.Errorf("accepted, but says\n%v, want\n%v", got, want)
		}
	})
}

// meaning reads text with encoding/json, and blanks what is random.
func meaning(t testing.TB, text []byte) map[string]any {
	t.Helper()
	var v map[string]any
	must(t, json.Unmarshal(text, &v))
	sub := func(m map[string]any, keys ...string) map[string]any {
		for _, k := range keys {
			m, _ = m[k].(map[string]any)
		}
		return m
	}
	delete(sub(v, "keyslots", "0", "kdf"), "salt")
	delete(sub(v, "digests", "0"), "salt")
	delete(sub(v, "digests", "0"), "digest")
	return v
}

// FuzzHeader: the guard never fails on two copies of any content, and what it
// accepts libcryptsetup loads, under the UUID that the guard found.
func FuzzHeader(f *testing.F) {
	good := header(f)
	add := func(raw []byte) {
		text, second := raw[binarySize:metadataSize], raw[metadataSize+binarySize:areasOffset]
		n := len(text)
		for n > 0 && text[n-1] == 0 && second[n-1] == 0 {
			n--
		}
		f.Add(raw[:sectorSize], raw[metadataSize:metadataSize+sectorSize], text[:n], second[:n], false)
		f.Add(raw[:sectorSize], raw[metadataSize:metadataSize+sectorSize], text[:n], second[:n], true)
	}
	add(good)
	for _, h := range hostileHeaders {
		add(h.forge(f, good))
	}
	f.Fuzz(func(t *testing.T, first, second, firstJSON, secondJSON []byte, reseal bool) {
		forged := forgery{t, append([]byte(nil), good...)}
		for at, parts := range map[int][2][]byte{0: {first, firstJSON}, metadataSize: {second, secondJSON}} {
			clear(forged.raw[at : at+metadataSize])
			copy(forged.raw[at:at+binarySize], parts[0])
			copy(forged.raw[at+binarySize:at+metadataSize], parts[1])
		}
		if reseal {
			forged.reseal()
		}
		g, err := guard(forged.raw)
		if err != nil {
			wantError(t, err, ErrHeaderRefused)
			return
		}
		h := &Header{raw: g.raw, uuid: g.uuid}
		must(t, h.withSession(func(*session) error { return nil }))
	})
}

// FuzzLiveTable: no answer of the device-mapper makes the reader panic, and a
// table that is accepted has the one cipher and a key from the keyring.
func FuzzLiveTable(f *testing.F) {
	f.Add(liveAnswer("CRYPT-LUKS2-x-data", 8192, "crypt", goodParams))
	f.Add(liveAnswer("", 8192, "linear", "7:0 0"))
	f.Add(make([]byte, dmHeaderSize))
	f.Fuzz(func(t *testing.T, answer []byte) {
		buf := make([]byte, dmBufferSize)
		copy(buf, answer)
		m, err := parseLive(buf)
		if err != nil {
			wantError(t, err, ErrTableMismatch)
			return
		}
		if _, err := checkTable(m, "data", idData.UUID); err != nil {
			wantError(t, err, ErrTableMismatch)
		}
	})
}

// liveAnswer is the kernel's answer for a mapping of one target.
func liveAnswer(uuid string, sectors uint64, kind, params string) []byte {
	ne := binary.NativeEndian
	buf := make([]byte, dmBufferSize)
	ne.PutUint32(buf[offDMStart:], dmHeaderSize)
	ne.PutUint32(buf[offDMTargets:], 1)
	ne.PutUint32(buf[offDMFlags:], dmActivePresent)
	ne.PutUint64(buf[offDMDev:], 254<<8)
	copy(buf[offDMUUID:], uuid)
	spec := buf[dmHeaderSize:]
	ne.PutUint64(spec[8:], sectors)
	copy(spec[24:], kind)
	copy(spec[dmSpecSize:], params)
	return buf
}

// The corpus in testdata/fuzz keeps every hostile JSON as it was when it was
// written, so that the guard meets it whatever becomes of the list in this
// package. New ones are added by -update.
func TestTheCorpusHoldsEveryHostileJSON(t *testing.T) {
	good := header(t)
	for _, h := range hostileHeaders {
		text := forgery{t, h.forge(t, good)}.json()
		if text == (forgery{t, good}).json() {
			continue // it is the binary header that is hostile
		}
		slug := strings.Trim(regexp.MustCompile(`[^a-zA-Z0-9]+`).ReplaceAllString(h.String(), "-"), "-")
		path := filepath.Join("testdata", "fuzz", "FuzzHeaderJSON", slug)
		if _, err := os.Stat(path); err == nil {
			continue
		} else if !*update {
			t.Errorf("%v; run the test with -update", err)
			continue
		}
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, fmt.Appendf(nil, "go test fuzz v1\n[]byte(%q)\n", text), 0o644))
	}
}
