package aws

import (
	"strings"

	"github.com/keyagent/keyagent/internal/pattern"
)

// arn names one key in one Region.
type arn struct{ partition, region, account, id string }

var (
	idPattern    = pattern.New(`^(?:[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|mrk-[0-9a-f]{32})$`)
	aliasPattern = pattern.New(`^alias/[a-zA-Z0-9/_-]{1,250}$`)
	arnPattern   = pattern.New(`^arn:(aws[a-z0-9-]{0,20}):kms:([a-z0-9-]{1,32}):([0-9]{12}):(.*)$`)
)

// parseARN reads the ARN of a key.
func parseARN(text string) (arn, bool) {
	a, ok := parseAnyARN(text)
	if !ok || a.id == "" {
		return arn{}, false
	}
	return a, true
}

// parseAnyARN reads the ARN of a key, or of an alias, which leaves id empty.
func parseAnyARN(text string) (arn, bool) {
	m := arnPattern.FindStringSubmatch(text)
	if m == nil {
		return arn{}, false
	}
	a := arn{partition: m[1], region: m[2], account: m[3]}
	if id, isKey := strings.CutPrefix(m[4], "key/"); isKey && idPattern.MatchString(id) {
		a.id = id
		return a, true
	}
	return a, aliasPattern.MatchString(m[4])
}

func (a arn) String() string {
	return "arn:" + a.partition + ":kms:" + a.region + ":" + a.account + ":key/" + a.id
}

// name is what stands in a wrapped key. A multi-Region key has one name in all of
// its Regions, so that key services in two of them agree on what is up to date.
func (a arn) name() string {
	if a.multiRegion() {
		a.region = "*"
	}
	return prefix + a.String()
}

// parseName undoes name for a client in a Region.
func parseName(text, region string) (arn, bool) {
	text, ours := strings.CutPrefix(text, prefix)
	if whole, anywhere := strings.CutPrefix(text, "arn:"); anywhere {
		if partition, rest, ok := strings.Cut(whole, ":kms:*:"); ok {
			a, ok := parseARN("arn:" + partition + ":kms:" + region + ":" + rest)
			return a, ours && ok && a.multiRegion()
		}
	}
	a, ok := parseARN(text)
	return a, ours && ok && !a.multiRegion()
}

func (a arn) multiRegion() bool { return strings.HasPrefix(a.id, "mrk-") }

// same reports whether both name one key: a multi-Region key is one in all of
// its Regions.
func (a arn) same(b arn) bool {
	if a.multiRegion() {
		b.region = a.region
	}
	return a == b
}

// names reports whether text, which may be an alias, can name a.
func names(text string, a arn) bool {
	named, isARN := parseAnyARN(text)
	switch {
	case isARN && (named.partition != a.partition || named.account != a.account || named.region != a.region):
		return false
	case isARN && named.id != "":
		return named.id == a.id
	}
	return isARN || aliasPattern.MatchString(text) || text == a.id
}
