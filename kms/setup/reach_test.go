package setup

import (
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// What a URI makes a process touch is known before it is opened.
func TestReachOfBackends(t *testing.T) {
	t.Setenv("HOME", "/home/operator")
	t.Setenv("TMPDIR", "/scratch")
	t.Setenv("AZURE_CONFIG_DIR", "/srv/az")
	t.Setenv("CLOUDSDK_CONFIG", "")
	t.Setenv("AWS_CONFIG_FILE", "/srv/aws/config")
	t.Setenv("AWS_SHARED_CREDENTIALS_FILE", "")
	cloud := []string{"/scratch", "/srv/az", "/srv/aws", "/home/operator/.aws", "/home/operator/.azure", "/home/operator/.config/gcloud"}
	for uri, want := range map[string]Reach{
		"kms://cluster-kms?file=/a/master&saltFile=b":                    {Read: []string{"/a/master", "b"}},
		"kms://cluster-kms?constellationFile=%2Fa%20b":                   {Read: []string{"/a b"}},
		"kms://cluster-kms?credential=master":                            {},
		"kms://vault?address=https://v&key=k&caFile=c&tokenFile=/run/t":  {Read: []string{"c", "/run/t"}},
		"kms://command?command=cat%20kek":                                {Commands: true},
		"kms://aws?keyName=k":                                            {Anything: true, Write: cloud},
		"kms://aws?keyName=k&attestationCommand=x&accessKeyFile=/srv/ak": {Anything: true, Commands: true, Read: []string{"/srv/ak"}, Write: cloud},
		"kms://gcp?credentialsPath=/srv/sa.json":                         {Anything: true, Read: []string{"/srv/sa.json"}, Write: cloud},
		"storage://azure?account=a&container=c":                          {Anything: true, Write: cloud},
		"storage://file?dir=/var/lib/records":                            {Write: []string{"/var/lib/records"}},
		"storage://etcd?endpoints=https://e&certFile=c&keyFile=k":        {Read: []string{"c", "k"}},
		"storage://no-store":                                             {},
	} {
		got, err := ReachOf(uri)
		slices.Sort(got.Read)
		slices.Sort(want.Read)
		slices.Sort(got.Write)
		slices.Sort(want.Write)
		if err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%s: %+v, %v", uri, got, err)
		}
	}
	if _, err := ReachOf("kms://a:1"); err == nil {
		t.Error("a URI that is none")
	}
}

// Each parameter of the configuration's page that names a file is known as one.
func TestReachKnowsEachFileOfThePage(t *testing.T) {
	text, err := os.ReadFile(filepath.Join("../../docs/configuration.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, m := range regexp.MustCompile("`([a-zA-Z]*(?:[fF]ile|[pP]ath|[dD]ir))`").FindAllStringSubmatch(string(text), -1) {
		r, err := ReachOf("kms://cluster-kms?" + m[1] + "=/x")
		if err != nil || !slices.Contains(append(r.Read, r.Write...), "/x") {
			t.Errorf("%s: %+v, %v", m[1], r, err)
		}
		found++
	}
	if found < 8 || !strings.Contains(string(text), "`File` behind") {
		t.Errorf("only %d parameters were found", found)
	}
}
