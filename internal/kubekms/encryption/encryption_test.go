package encryption

import (
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/keyagent/keyagent/internal/config"
)

const head = "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n"

func diagnose(t *testing.T, text string) string {
	t.Helper()
	f, err := Parse("e.yaml", []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, one := range Diagnose(f) {
		b.WriteString(string(one.Severity) + " " + one.Where + ": " + one.What + "\n")
	}
	return b.String()
}

func TestTheExampleIsGood(t *testing.T) {
	f, err := Read("../../../deploy/kubernetes/encryption.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, one := range Diagnose(f) {
		if one.Severity != Advice {
			t.Errorf("%+v", one)
		}
	}
}

func TestTheFileIsReadStrictly(t *testing.T) {
	for name, tt := range map[string][2]string{
		"an unknown field":   {head + "- resources: [secrets]\n  providers:\n  - kms: {name: a, endpont: unix:///s}\n", `line 6: unknown field "endpont"`},
		"a duplicate field":  {head + "- resources: [secrets]\n  resources: [x]\n", "already defined"},
		"another kind":       {"apiVersion: apiserver.config.k8s.io/v1\nkind: Pod\n", `kind: it is "Pod"`},
		"half of another":    {"apiVersion: v1\nkind: EncryptionConfiguration\n", "line 1: apiVersion"},
		"the other half":     {"apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfig\n", "kind: it is"},
		"another version":    {"apiVersion: v1\nkind: EncryptionConfiguration\n", "line 1: apiVersion"},
		"a second document":  {head + "---\n" + head, "more than one document"},
		"nothing":            {"", "the file is empty"},
		"a number of a name": {head + "- resources: {a: b}\n", "line 4"},
	} {
		if _, err := Parse("e.yaml", []byte(tt[0])); !errors.Is(err, config.ErrInvalid) || !strings.Contains(err.Error(), tt[1]) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestWhatIsWrongIsNamed(t *testing.T) {
	kms := func(fields string) string {
		return head + "- resources: [secrets]\n  providers:\n  - kms: {" + fields + "}\n"
	}
	good := "apiVersion: v2, name: a, endpoint: 'unix:///run/k/s'"
	for name, tt := range map[string]struct{ text, want string }{
		"nothing":              {kms(good), ""},
		"the head of 2018":     {"apiVersion: v1\nkind: EncryptionConfig\nresources:\n- resources: [secrets]\n  providers:\n  - kms: {" + good + "}\n", "advice apiVersion: this is the head of 2018"},
		"no resources":         {"apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\n", "refused resources: there are none\n"},
		"no list":              {head + "- providers: [{identity: {}}]\n", "refused resources[0].resources: the list is empty"},
		"no providers":         {head + "- resources: [secrets]\n", "refused resources[0].providers: the list is empty\n"},
		"two in one":           {head + "- resources: [secrets]\n  providers:\n  - {identity: {}, kms: {" + good + "}}\n", "refused resources[0].providers[0]: an element is exactly one"},
		"none in one":          {head + "- resources: [secrets]\n  providers: [{}]\n", "refused resources[0].providers[0]: an element is exactly one"},
		"v3":                   {kms("apiVersion: v3, name: a, endpoint: 'unix:///run/k/s'"), "refused resources[0].providers[0].kms.apiVersion: unknown version"},
		"v1 by default":        {kms("name: a, endpoint: 'unix:///run/k/s'"), "advice resources[0].providers[0].kms.apiVersion: v1 is deprecated"},
		"a cache of v2":        {kms(good + ", cachesize: 5"), "refused resources[0].providers[0].kms.cachesize: v2 has none\n"},
		"no cache of v1":       {kms("name: a, endpoint: 'unix:///run/k/s', cachesize: 0"), "refused resources[0].providers[0].kms.cachesize: it is 0"},
		"a colon":              {kms("apiVersion: v2, name: 'a:b', endpoint: 'unix:///run/k/s'"), "refused resources[0].providers[0].kms.name: a name in v2 has no colon"},
		"no name":              {kms("apiVersion: v2, endpoint: 'unix:///run/k/s'"), "refused resources[0].providers[0].kms.name: it is missing"},
		"no endpoint":          {kms("apiVersion: v2, name: a"), "refused resources[0].providers[0].kms.endpoint: it is missing"},
		"TCP":                  {kms("apiVersion: v2, name: a, endpoint: 'tcp://127.0.0.1:1'"), "only unix sockets are possible"},
		"two slashes":          {kms("apiVersion: v2, name: a, endpoint: 'unix://run/k/s'"), "danger resources[0].providers[0].kms.endpoint: \"unix://run/k/s\" names no path"},
		"a name of gRPC":       {kms("apiVersion: v2, name: a, endpoint: 'unix:@k'"), "danger resources[0].providers[0].kms.endpoint"},
		"an abstract one":      {kms("apiVersion: v2, name: a, endpoint: 'unix:///@k'"), "advice resources[0].providers[0].kms.endpoint: an abstract socket has no permissions"},
		"in /tmp":              {kms("apiVersion: v2, name: a, endpoint: 'unix:///tmp/kms.sock'"), "danger resources[0].providers[0].kms.endpoint"},
		"no duration":          {kms(good + ", timeout: 3"), "refused resources[0].providers[0].kms.timeout"},
		"a negative one":       {kms(good + ", timeout: -3s"), "refused resources[0].providers[0].kms.timeout"},
		"a long one":           {kms(good + ", timeout: 1m"), "advice resources[0].providers[0].kms.timeout"},
		"plaintext first":      {head + "- resources: [secrets]\n  providers:\n  - identity: {}\n  - kms: {" + good + "}\n", "danger resources[0].providers[0]: identity comes first"},
		"plaintext in between": {head + "- resources: [secrets]\n  providers:\n  - kms: {" + good + "}\n  - identity: {}\n  - kms: {apiVersion: v2, name: b, endpoint: 'unix:///run/k/t'}\n", "danger resources[0].providers[1]: identity reads everything"},
		"plaintext at the end": {head + "- resources: [secrets]\n  providers:\n  - kms: {" + good + "}\n  - identity: {}\n", "advice resources[0].providers[1]: identity is for the time"},
		"a key in the file":    {head + "- resources: [secrets]\n  providers:\n  - aescbc: {keys: [{name: k, secret: MDEyMzQ1Njc4OWFiY2RlZg==}]}\n", "danger resources[0].providers[0]: the key that writes stands in this file"},
		"a short key":          {head + "- resources: [secrets]\n  providers:\n  - kms: {" + good + "}\n  - secretbox: {keys: [{name: k, secret: MDEyMzQ1Njc4OWFiY2RlZg==}]}\n", "keys[0].secret: it has 16 bytes, allowed are [32]"},
		"no secrets":           {head + "- resources: [configmaps]\n  providers:\n  - kms: {" + good + "}\n", "danger resources: secrets are in no list"},
		"the same twice":       {head + "- resources: [secrets, secrets]\n  providers:\n  - kms: {" + good + "}\n", "stands in this list twice"},
		"overlapping":          {head + "- resources: [secrets, '*.']\n  providers:\n  - kms: {" + good + "}\n", "overlap"},
		"hidden":               {head + "- resources: ['*.*']\n  providers:\n  - kms: {" + good + "}\n- resources: [secrets]\n  providers:\n  - kms: {apiVersion: v2, name: b, endpoint: 'unix:///run/k/t'}\n", "danger resources[1].resources[0]: \"*.*\" of resources[0].resources[0] wins"},
		"two of one name":      {head + "- resources: [secrets]\n  providers:\n  - kms: {" + good + "}\n- resources: [configmaps]\n  providers:\n  - kms: {" + good + "}\n", "refused resources[1].providers[0].kms.name: \"a\" is the name in resources[0].providers[0].kms too"},
	} {
		got := diagnose(t, tt.text)
		if tt.want == "" && got != "" || !strings.Contains(got, tt.want) {
			t.Errorf("%s:\n%swant %s", name, got, tt.want)
		}
		if strings.Contains(got, "MDEyMzQ1") || strings.Contains(got, "0123456789abcdef") {
			t.Errorf("%s: a secret is shown: %s", name, got)
		}
	}
}

func TestAPlanWaitsForEverybody(t *testing.T) {
	f, err := Read("../../../deploy/kubernetes/encryption.yaml")
	if err != nil {
		t.Fatal(err)
	}
	plan, err := Plan(f, Timing{12 * time.Minute, 2, 24 * time.Hour})
	if err != nil || len(plan) != 1 {
		t.Fatalf("%v, %v", plan, err)
	}
	// Two fetches and their slack, the API server's four minutes, and a reload.
	if want := 2*12*time.Minute + time.Minute + 4*time.Minute + time.Minute; plan[0].Total != want {
		t.Errorf("%s, want %s", plan[0].Total, want)
	}
	var order []string
	for _, s := range plan[0].Steps {
		order = append(order, strings.Fields(s.What)[0])
	}
	if got := strings.Join(order, " "); got != "Back Keep Change Wait Wait Check Rewrite Rewrite Look Take Forget" {
		t.Errorf("%s", got)
	}
	v1, err := Parse("e", []byte(head+"- resources: [secrets]\n  providers:\n  - kms: {name: a, endpoint: 'unix:///s'}\n"))
	if err != nil {
		t.Fatal(err)
	}
	if plan, err := Plan(v1, Timing{time.Minute, 1, time.Hour}); err != nil || plan[0].Total != 2*time.Minute {
		t.Errorf("%v, %v", plan, err)
	}
	none, err := Parse("e", []byte(head+"- resources: [secrets]\n  providers: [{identity: {}}]\n"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Plan(none, Timing{}); err == nil {
		t.Error("there is a plan for no plugin")
	}
}

func FuzzEncryptionConfiguration(f *testing.F) {
	f.Add([]byte(head + "- resources: [secrets]\n  providers:\n  - kms: {apiVersion: v2, name: a, endpoint: 'unix:///s'}\n"))
	f.Add([]byte(head + "- resources: [secrets]\n  providers:\n  - aescbc: {keys: [{name: k, secret: MDEyMzQ1Njc4OWFiY2RlZg==}]}\n  - identity: {}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		file, err := Parse("e", data)
		if err != nil {
			return
		}
		_ = Diagnose(file)
		plan, err := Plan(file, Timing{time.Minute, 2, time.Hour})
		if _, jsonErr := json.Marshal(plan); err == nil && (len(plan) == 0 || jsonErr != nil) {
			t.Errorf("%v, %v", plan, jsonErr)
		}
	})
}
