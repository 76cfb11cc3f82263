package luks

import (
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"

	"github.com/keyagent/keyagent/internal/secret"
)

var update = flag.Bool("update", false, "write the golden files anew")

// macVector is one line of testdata/vectors.json. Another implementation of the
// formats can be checked against them: the message is i mod 251 for i below length,
// and the attempt is 16 bytes that count up from 1. A message that is as long as a
// header of either form has MACs of its copies.
type macVector struct {
	Name       string `json:"name"`
	DEK        string `json:"dek"`
	Volume     string `json:"volume"`
	UUID       string `json:"uuid"`
	Generation uint64 `json:"generation"`
	MACInfo    string `json:"mac_info"`
	Length     int    `json:"length"`
	MAC        string `json:"mac"`
	Marker     string `json:"marker"`
	Mark       string `json:"filesystem_mark"`
	Clone      string `json:"clone_mark"`
	Primary    string `json:"primary_mac,omitempty"`
	Secondary  string `json:"secondary_mac,omitempty"`
}

func TestTheVectorsHold(t *testing.T) {
	const golden = "testdata/vectors.json"
	text, err := os.ReadFile(golden)
	must(t, err)
	var vectors []macVector
	must(t, json.Unmarshal(text, &vectors))
	for i := range vectors {
		v := &vectors[i]
		p, err := hex.DecodeString(v.DEK)
		must(t, err)
		dek, err := secret.From(p)
		must(t, err)
		defer dek.Close()
		message := make([]byte, v.Length)
		for j := range message {
			message[j] = byte(j % 251)
		}
		id := Identity{v.Volume, v.UUID, v.Generation}
		must(t, id.validate())
		mac, err := headerMAC(guarded{raw: message}, id, dek)
		must(t, err)
		marker, err := newMarker(id, dek)
		must(t, err)
		got := *v
		got.MACInfo = hex.EncodeToString([]byte(derivationInfo(macLabel, id)))
		got.MAC, got.Marker = hex.EncodeToString(mac[:]), hex.EncodeToString(marker)
		var attempt [16]byte
		for j := range attempt {
			attempt[j] = byte(j + 1)
		}
		mark, err := NewFilesystemMark(id, attempt, dek)
		must(t, err)
		got.Mark = hex.EncodeToString(mark.sector)
		clone, err := taggedSector(cloneMagic, cloneLabel, id, nil, dek)
		must(t, err)
		got.Clone = hex.EncodeToString(clone)
		if v.Length == guardedSize || v.Length == maxGuardedSize {
			macs, err := headerMACs(guarded{raw: message}, id, dek)
			must(t, err)
			got.Primary, got.Secondary = hex.EncodeToString(macs.Copies[0][:]), hex.EncodeToString(macs.Copies[1][:])
		}
		if *update {
			*v = got
		} else if got != *v {
			t.Errorf("%s: got %+v, want %+v", v.Name, got, *v)
		}
	}
	if *update {
		text, err := json.MarshalIndent(vectors, "", "  ")
		must(t, err)
		must(t, os.WriteFile(golden, append(text, '\n'), 0o644))
	}
}

func TestTheMACIsOfOneHeaderOneIdentityAndOneDEK(t *testing.T) {
	raw, dek := header(t), dataKey(t)
	mac, err := headerMAC(guarded{raw: raw}, idData, dek)
	must(t, err)
	if err := authenticate(guarded{raw: raw, uuid: idData.UUID}, idData, mac, dek); err != nil {
		t.Fatal(err)
	}
	other := func(edit func(*Identity)) Identity { id := idData; edit(&id); return id }
	for _, c := range []struct {
		name string
		id   Identity
		dek  *secret.Bytes
		flip int // a byte of the header, or -1
	}{
		{"another volume", other(func(id *Identity) { id.Volume = "data2" }), dek, -1},
		{"the generation before", other(func(id *Identity) { id.Generation-- }), dek, -1},
		{"another DEK", idData, logsKey(t), -1},
		{"a longer DEK", idData, key(t, 1, 33), -1},
		{"a changed binary header", idData, dek, 0},
		{"a changed salt", idData, dek, offSalt},
		{"a changed secondary header", idData, dek, metadataSize + offSalt},
		{"a changed JSON area", idData, dek, binarySize + 50},
		{"a changed keyslot", idData, dek, areasOffset + 1000},
		{"the last byte of the keyslot's area", idData, dek, guardedSize - 1},
	} {
		t.Run(c.name+" does not verify", func(t *testing.T) {
			g := guarded{raw: append([]byte(nil), raw...), uuid: idData.UUID}
			if c.flip >= 0 {
				g.raw[c.flip] ^= 1
			}
			err := authenticate(g, c.id, mac, c.dek)
			wantError(t, err, ErrHeaderMAC)
		})
	}
	err = authenticate(guarded{raw: raw, uuid: idLogs.UUID}, idData, mac, dek)
	wantError(t, err, ErrVolumeMismatch)
}

// Two identities whose parts join to the same text must not meet.
func TestTheDerivationInfoIsUnambiguous(t *testing.T) {
	seen := map[string]Identity{}
	for _, volume := range []string{"a", "aa", "a6", "data"} {
		for _, generation := range []uint64{0, 1, 256, 1 << 63} {
			for _, uuid := range []string{idData.UUID, idLogs.UUID} {
				for _, label := range []string{macLabel, copyMACLabel, markerLabel, markLabel, cloneLabel} {
					id := Identity{volume, uuid, generation}
					info := derivationInfo(label, id)
					if before, twice := seen[info]; twice {
						t.Errorf("%+v and %+v have one encoding", before, id)
					}
					seen[info] = id
				}
			}
		}
	}
}
