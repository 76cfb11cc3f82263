//go:build !keyagent_noaws

package setup

import (
	"errors"
	"net/http/httptest"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/johannesboyne/gofakes3"
	"github.com/johannesboyne/gofakes3/backend/s3mem"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/storage"
)

func TestAnS3BucketIsOpenedWithKeysFromFiles(t *testing.T) {
	server := httptest.NewServer(gofakes3.New(s3mem.New()).Server())
	t.Cleanup(server.Close)
	dir := t.TempDir()
	for name, text := range map[string]string{"id": "AKIDEXAMPLE\n", "key": "hunter2\n"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	uri := "storage://aws?" + url.Values{
		"bucket": {"records"}, "region": {"eu-central-1"}, "prefix": {"k"}, "createBucket": {"true"}, "endpoint": {server.URL},
		"accessKeyIDFile": {filepath.Join(dir, "id")}, "accessKeyFile": {filepath.Join(dir, "key")},
	}.Encode()
	s, err := Storage(t.Context(), uri)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	if _, err := s.Put(t.Context(), "a", []byte("x"), storage.Absent); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "key")); err != nil {
		t.Fatal(err)
	}
	if s, err := Storage(t.Context(), uri); err == nil || s != nil || !strings.Contains(err.Error(), "accessKey") {
		t.Errorf("without the file: %v", err)
	}
}

func TestAnS3URIIsStrict(t *testing.T) {
	for name, uri := range map[string]string{
		"no bucket":               "storage://aws?region=hunter2",
		"an unknown parameter":    "storage://aws?bucket=b&secret=hunter2",
		"half of the credentials": "storage://aws?bucket=b&accessKey=hunter2",
		"a key from two places":   "storage://aws?bucket=b&accessKeyID=x&accessKey=hunter2&accessKeyFile=hunter2",
		"neither true nor false":  "storage://aws?bucket=b&createBucket=hunter2",
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Storage(t.Context(), uri)
			if !errors.Is(err, kms.ErrURI) || s != nil || strings.Contains(err.Error(), "hunter2") {
				t.Fatalf("%v, %v", s, err)
			}
		})
	}
}
