package luks

import (
	"errors"
	"strings"
	"testing"
)

// verityTable is one that veritysetup loads.
func verityTable(change func(words []string) []string) []liveTarget {
	words := strings.Fields("1 7:0 7:1 4096 4096 256 1 sha256 " + strings.Repeat("ab", 32) + " " + strings.Repeat("cd", 32))
	if change != nil {
		words = change(words)
	}
	return []liveTarget{{length: 2048, kind: "verity", params: strings.Join(words, " ")}}
}

func with(more ...string) func([]string) []string {
	return func(w []string) []string { return append(w, more...) }
}

func word(n int, text string) func([]string) []string {
	return func(w []string) []string { w[n] = text; return w }
}

func TestAVerityTableIsReadStrictly(t *testing.T) {
	for name, change := range map[string]func([]string) []string{
		"plain": nil, "one option": with("1", "panic_on_corruption"), "no options": with("0"), "error correction": with("8", "use_fec_from_device", "7:2", "fec_roots", "2", "fec_blocks", "256", "fec_start", "0"),
		"a signature": with("3", "restart_on_corruption", "root_hash_sig_key_desc", "x"),
	} {
		v, err := parseVerity(verityTable(change))
		if err != nil || v.Bytes != 1<<20 || v.RootHash != strings.Repeat("ab", 32) {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	for name, change := range map[string]func([]string) []string{
		"corruption is ignored": with("1", "ignore_corruption"), "checked once": with("1", "check_at_most_once"), "an unknown option": with("1", "x"),
		"an option cut off": with("1", "fec_roots"), "a wrong count": with("2", "panic_on_corruption"), "no count": with("panic_on_corruption"),
		"another version": word(0, "0"), "a weak hash": word(7, "sha1"), "a short root hash": word(8, "ab"), "upper case": word(8, strings.Repeat("AB", 32)),
		"half of the mapping": word(5, "128"), "more than the mapping": word(5, "512"), "no blocks": word(5, "0"), "too many blocks": word(5, "281474976710655"),
		"blocks of no size": word(3, "0"), "a negative size": word(3, "-4096"), "cut off": func(w []string) []string { return w[:9] },
	} {
		if v, err := parseVerity(verityTable(change)); !errors.Is(err, ErrTableMismatch) {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
	two := append(verityTable(nil), verityTable(nil)...)
	if _, err := parseVerity(two); !errors.Is(err, ErrTableMismatch) {
		t.Errorf("two targets: %v", err)
	}
	for _, kind := range []string{"linear", "crypt", ""} {
		table := verityTable(nil)
		table[0].kind = kind
		if _, err := parseVerity(table); !errors.Is(err, ErrTableMismatch) {
			t.Errorf("a %q target: %v", kind, err)
		}
	}
}

func FuzzVerityTable(f *testing.F) {
	f.Add(verityTable(nil)[0].params, uint64(2048))
	f.Add(verityTable(with("1", "panic_on_corruption"))[0].params, uint64(2048))
	f.Fuzz(func(t *testing.T, params string, length uint64) {
		v, err := parseVerity([]liveTarget{{length: length, kind: "verity", params: params}})
		if err == nil && (v.Bytes <= 0 || uint64(v.Bytes) != length*sectorSize || !strings.Contains(params, v.RootHash)) {
			t.Errorf("%q: %+v", params, v)
		}
	})
}
