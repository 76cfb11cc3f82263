package emulator

import (
	"crypto/tls"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"
)

func status(t *testing.T, client *http.Client, url, token string) int {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	if token != "" {
		r.Header.Set("Authorization", "Bearer "+token)
		r.Header.Set("X-Ms-Version", "2021-12-02")
	}
	a, err := client.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	a.Body.Close()
	return a.StatusCode
}

func TestEachServerAnswers(t *testing.T) {
	t.Run("S3", func(t *testing.T) {
		if got := status(t, http.DefaultClient, S3(t).URL, ""); got != http.StatusForbidden {
			t.Errorf("without a signature: %d", got)
		}
	})
	t.Run("GCS", func(t *testing.T) {
		if got := status(t, http.DefaultClient, GCS(t)+"/storage/v1/b/none", ""); got != http.StatusNotFound {
			t.Errorf("a bucket that is not there: %d", got)
		}
	})
	t.Run("AzureBlob", func(t *testing.T) {
		s := AzureBlob(t)
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: s.Roots}}}
		defer client.CloseIdleConnections()
		for token, want := range map[string]int{s.Token(): http.StatusOK, "x": http.StatusForbidden} {
			if got := status(t, client, s.URL+"/?comp=list", token); got != want {
				t.Errorf("%d, want %d", got, want)
			}
		}
	})
	t.Run("Etcd", func(t *testing.T) {
		if got := status(t, http.DefaultClient, Etcd(t)+"/version", ""); got != http.StatusOK {
			t.Errorf("%d", got)
		}
	})
	t.Run("AWSKMS", func(t *testing.T) {
		if got := status(t, http.DefaultClient, AWSKMS(t), ""); got != http.StatusNotImplemented {
			t.Errorf("a request that is none: %d", got)
		}
	})
}

func TestAServerEndsWithItsTest(t *testing.T) {
	var url string
	t.Run("a test", func(t *testing.T) { url = Etcd(t) })
	client := &http.Client{Timeout: time.Second}
	if _, err := client.Get(url); err == nil {
		t.Error("it still answers")
	}
}

func TestAServerThatDoesNotStartShowsItsOutput(t *testing.T) {
	dir := t.TempDir()
	err := run(t, command{path: "/bin/sh", args: []string{"-c", "echo that is why; exit 1"}}, dir, "http://127.0.0.1:1")
	if err == nil || !strings.Contains(err.Error(), "that is why") {
		t.Error(err)
	}
}

func TestWhatIsKeptIsMadeOnceAndAgainWhenItsSourcesChange(t *testing.T) {
	t.Setenv("XDG_CACHE_HOME", t.TempDir())
	source := t.TempDir()
	made := 0
	get := func(fails bool) (string, error) {
		return entry("x", []string{source}, "", func(string) *exec.Cmd {
			made++
			if fails {
				return exec.Command("false")
			}
			return exec.Command("true")
		})
	}
	if _, err := get(true); err == nil {
		t.Fatal("what failed was kept")
	}
	first, err := get(false)
	if err != nil {
		t.Fatal(err)
	}
	if again, err := get(false); err != nil || again != first || made != 2 {
		t.Fatalf("%q, %v, made %d times", again, err, made)
	}
	if err := os.WriteFile(source+"/file", []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if other, err := get(false); err != nil || other == first {
		t.Fatalf("%q, %v", other, err)
	}
}
