package luks

import (
	"errors"
	"strings"
	"testing"
)

func TestTheGuardAcceptsWhatFormatWrites(t *testing.T) {
	g, err := guard(header(t))
	must(t, err)
	if g.uuid != idData.UUID {
		t.Errorf("UUID is %s", g.uuid)
	}
}

func TestTheGuardRefusesHostileHeaders(t *testing.T) {
	for _, h := range hostileHeaders {
		t.Run(h.String(), func(t *testing.T) {
			_, err := guard(h.forge(t, header(t)))
			wantRule(t, err, h.rule)
			t.Log(err)
		})
	}
}

// Every single value of the JSON is one that the whitelist looks at: whichever is
// changed, the header is refused.
func TestNoValueOfTheJSONIsLeftUnread(t *testing.T) {
	good := forgery{t, header(t)}.json()
	inText := false
	for i, c := range []byte(good) {
		if c == '"' {
			inText = !inText
			continue
		}
		if strings.ContainsRune("{}[]:,", rune(c)) && !inText {
			continue
		}
		changed := []byte(good)
		changed[i] = 'Z'
		root, err := parseJSON(changed)
		if err == nil {
			err = plain.whitelist.check("", root)
		}
		// The salts and the digest are the MAC's to protect: any base64 will do.
		if err == nil && !strings.Contains(good[max(0, i-60):i], `"salt":"`) && !strings.Contains(good[max(0, i-60):i], `"digest":"`) {
			t.Errorf("accepted with Z at byte %d: %s", i, changed)
		}
	}
}

func TestARefusalNamesTheFieldAndWhatStandsThere(t *testing.T) {
	_, err := guard(hostileHeaders[0].forge(t, header(t)))
	const want = `header refused: null cipher: segments.0.encryption is "cipher_null-ecb"`
	if err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
}

func TestARefusalIsShortHoweverLongTheHeaderIs(t *testing.T) {
	f := forgery{t, header(t)}
	f.replace(noTokens, `"tokens":{},"`+strings.Repeat("k", 5000)+`":"`+strings.Repeat("v", 5000)+`"`)
	_, err := guard(f.raw)
	wantRule(t, err, RuleUnknownField)
	if n := len(err.Error()); n > 200 {
		t.Errorf("error has %d bytes", n)
	}
}

func TestAHeaderThatEndsEarlyIsIncomplete(t *testing.T) {
	for _, n := range []int{0, 1, sectorSize, metadataSize, guardedSize - 1} {
		if _, err := guard(header(t)[:n]); !errors.Is(err, ErrShortHeader) {
			t.Errorf("%d bytes: error is %v", n, err)
		}
	}
}
