package replica

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/volume"
)

func TestAPageIsReadStrictly(t *testing.T) {
	var most []volume.Sighting
	for i := range PageSize {
		most = append(most, volume.Sighting{Volume: fmt.Sprintf("%s%d", strings.Repeat("v", 124), i%10), Revision: MaxRevision})
	}
	for name, page := range map[string][]volume.Sighting{
		"nothing": nil, "one": {{Volume: "data-1", Revision: 1}}, "as many as there may be": most,
	} {
		got, err := ParsePage(EncodePage(page))
		if err != nil || len(got) != len(page) || len(page) > 0 && got[len(page)-1] != page[len(page)-1] {
			t.Errorf("%s: %d, %v", name, len(got), err)
		}
	}
	if n := len(EncodePage(most)); n > maxMessage*3/4 {
		t.Errorf("the largest page has %d bytes", n)
	}
	for name, text := range map[string]string{
		"no end":              "data-1 1",
		"an empty line":       "\n",
		"no revision":         "data-1\n",
		"no volume":           " 1\n",
		"another volume's":    "../data-1 1\n",
		"two blanks":          "data-1  1\n",
		"a blank at the end":  "data-1 1 \n",
		"a revision of zero":  "data-1 0\n",
		"a leading zero":      "data-1 01\n",
		"a sign":              "data-1 +1\n",
		"below zero":          "data-1 -1\n",
		"too large":           fmt.Sprintf("data-1 %d\n", uint64(MaxRevision)+1),
		"far too large":       "data-1 18446744073709551616\n",
		"hexadecimal":         "data-1 0x1\n",
		"a carriage return":   "data-1 1\r\n",
		"a second bad line":   "data-1 1\ndata-2\n",
		"more than there may": strings.Repeat("d 1\n", PageSize+1),
	} {
		if page, err := ParsePage([]byte(text)); !errors.Is(err, ErrPage) || page != nil {
			t.Errorf("%s: %v, %v", name, page, err)
		}
	}
}

// FuzzParsePage: what is read is written as it was.
func FuzzParsePage(f *testing.F) {
	f.Add([]byte("data-1 1\ndata-2 281474976710656\n"))
	f.Add([]byte("data-1 01\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		page, err := ParsePage(data)
		switch {
		case err != nil && !errors.Is(err, ErrPage):
			t.Fatal(err)
		case err == nil && !bytes.Equal(EncodePage(page), data):
			t.Fatalf("%q is read as %v", data, page)
		}
	})
}
