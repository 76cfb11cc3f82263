package lab

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/iotest"
)

func TestSearchCountsEachOccurrenceOnceWhereverChunksEnd(t *testing.T) {
	for _, c := range []struct {
		hay, needle string
		want        int
	}{
		{"", "abc", 0}, {"ab", "abc", 0}, {"abc", "abc", 1}, {"xxabcxabc", "abc", 2}, {"aaaa", "aa", 3}, {"abab", "b", 2},
	} {
		for chunk := 1; chunk < 12; chunk++ {
			got, err := searchReader(iotest.OneByteReader(strings.NewReader(c.hay)), []byte(c.needle), chunk)
			if err != nil || got != c.want {
				t.Errorf("%q in %q by %d: %d, %v; want %d", c.needle, c.hay, chunk, got, err, c.want)
			}
		}
	}
}

func TestSearchFileLooksAtAllOfALargeFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "dump")
	needle := []byte("needle across two chunks")
	data := bytes.Repeat([]byte{0x5a}, 3<<20)
	copy(data[1<<20-7:], needle)
	copy(data[len(data)-len(needle):], needle)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := SearchFile(path, needle); err != nil || got != 2 {
		t.Errorf("got %d, %v", got, err)
	}
	if _, err := SearchFile(path, nil); err == nil {
		t.Error("an empty needle was looked for")
	}
}
