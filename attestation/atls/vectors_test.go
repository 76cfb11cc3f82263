package atls

import (
	"encoding/hex"
	"encoding/json"
	"flag"
	"os"
	"testing"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
)

var update = flag.Bool("update", false, "write testdata/vectors.json anew")

// hexBytes are bytes in a JSON file.
type hexBytes []byte

func (h hexBytes) MarshalText() ([]byte, error) { return []byte(hex.EncodeToString(h)), nil }

func (h *hexBytes) UnmarshalText(text []byte) (err error) {
	*h, err = hex.DecodeString(string(text))
	return err
}

type vectorItem struct {
	Kind string   `json:"kind"`
	Data hexBytes `json:"data"`
}

// vectors fix the encodings that both sides must share. They were computed a
// second time, from the specification, by another program.
type vectors struct {
	ExporterLabel   string `json:"exporter_label"`
	ExporterSize    int    `json:"exporter_size"`
	ExporterContext []struct {
		Name    string       `json:"name"`
		Offers  []vectorItem `json:"offers"`
		HPKE    hexBytes     `json:"hpke_public_key"`
		Nonce   hexBytes     `json:"nonce"`
		Asks    []vectorItem `json:"asks"`
		Context hexBytes     `json:"context"`
	} `json:"exporter_context"`
	Binder []struct {
		Name       string   `json:"name"`
		Role       string   `json:"role"`
		Exporter   hexBytes `json:"exporter"`
		ClientSPKI hexBytes `json:"client_spki"`
		ServerSPKI hexBytes `json:"server_spki"`
		Nonce      hexBytes `json:"nonce"`
		HPKE       hexBytes `json:"hpke_public_key"`
		Binder     hexBytes `json:"binder"`
	} `json:"binder"`
	SealInfo []struct {
		Name     string   `json:"name"`
		Binder   hexBytes `json:"binder"`
		Info     hexBytes `json:"info"`
		SealInfo hexBytes `json:"seal_info"`
	} `json:"seal_info"`
}

func protoItems(items []vectorItem) (out []*attestv1.Item) {
	for _, i := range items {
		out = append(out, &attestv1.Item{Kind: i.Kind, Data: i.Data})
	}
	return out
}

func TestVectors(t *testing.T) {
	const path = "testdata/vectors.json"
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var v vectors
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	same := func(name string, want *hexBytes, got []byte) {
		if *update {
			*want = got
		} else if string(*want) != string(got) {
			t.Errorf("%s: %x, the vector says %x", name, got, *want)
		}
	}
	for i := range v.ExporterContext {
		x := &v.ExporterContext[i]
		same(x.Name, &x.Context, exporterContext(&attestv1.Hello{Offers: protoItems(x.Offers), HpkePublicKey: x.HPKE},
			&attestv1.Challenge{Nonce: x.Nonce, Asks: protoItems(x.Asks)}))
	}
	for i := range v.Binder {
		x := &v.Binder[i]
		b := binderInput{role(x.Role), x.Exporter, x.ClientSPKI, x.ServerSPKI, x.Nonce, x.HPKE}.binder()
		same(x.Name, &x.Binder, b[:])
	}
	for i := range v.SealInfo {
		x := &v.SealInfo[i]
		same(x.Name, &x.SealInfo, sealInfo(attestation.Binder(x.Binder), x.Info))
	}
	if v.ExporterLabel != exporterLabel || v.ExporterSize != exporterSize {
		t.Errorf("exporter %q of %d bytes", v.ExporterLabel, v.ExporterSize)
	}
	if len(v.ExporterContext) == 0 || len(v.Binder) == 0 || len(v.SealInfo) == 0 {
		t.Error("there are no vectors")
	}
	if *update {
		out, err := json.MarshalIndent(v, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(out, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}

// Two different lists of fields never have one encoding.
func TestFieldsAreUnambiguous(t *testing.T) {
	seen := map[string]int{}
	for i, list := range [][]string{{"ab", "c"}, {"a", "bc"}, {"abc"}, {"abc", ""}, {"", "abc"}, {}, {""}, {"", ""}} {
		f := fields(nil)
		for _, s := range list {
			f = f.add([]byte(s))
		}
		if before, ok := seen[string(f)]; ok {
			t.Errorf("lists %d and %d are both %x", before, i, f)
		}
		seen[string(f)] = i
	}
}
