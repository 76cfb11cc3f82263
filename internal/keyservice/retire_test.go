package keyservice

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	keyservicev1 "github.com/keyagent/keyagent/api/keyagent/keyservice/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/volume"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/test/sim/cloud"
)

func retire(t *testing.T, m keyservicev1.KeyServiceClient, lease []byte) (*keyservicev1.RetireVolumeResponse, error) {
	resp, err := m.RetireVolume(t.Context(), &keyservicev1.RetireVolumeRequest{VolumeId: "data-1", LeaseId: lease})
	return resp, failure.FromStatus(err)
}

func TestANodeRetiresItsVolume(t *testing.T) {
	w := newWorld(t)
	m, lease := w.granted("[open, format]")
	_, err := retire(t, m, lease)
	wantClass(t, err, failure.PolicyDenied)
	w.writePolicy(w.pcr(4), `["data-*"]`, "[open, format, retire]")
	must(t, w.server.Reload())
	_, err = retire(t, w.another(), nil)
	wantClass(t, err, failure.Held)
	for range 2 {
		resp, err := retire(t, m, lease)
		must(t, err)
		rec, err := w.server.service.volumes.Get(t.Context(), "data-1")
		must(t, err)
		if rec.State != volume.Retired || len(rec.Keys) != 0 || rec.Lease != nil || resp.GetLuksUuid() != rec.LUKSUUID || resp.GetRecordKept() {
			t.Fatalf("%+v, %+v", rec, resp)
		}
	}
	for _, op := range []keyservicev1.Operation{openOp, formatOp} {
		_, _, err = w.get(m, "data-1", op)
		wantClass(t, err, failure.State)
	}
	_, err = m.RenewLease(t.Context(), &keyservicev1.RenewLeaseRequest{VolumeId: "data-1", LeaseId: lease})
	wantClass(t, failure.FromStatus(err), failure.State)
	_, err = m.RetireVolume(t.Context(), &keyservicev1.RetireVolumeRequest{VolumeId: "data-2"})
	wantClass(t, failure.FromStatus(err), failure.NotFound)
	log, err := os.ReadFile(w.cfg.Audit)
	must(t, err)
	if !bytes.Contains(log, []byte(`"event":"retire-volume"`)) || !bytes.Contains(log, []byte(`0 earlier versions of the record were destroyed`)) {
		t.Errorf("the audit log does not have it: %s", log)
	}
}

// stored returns all that a storage holds: of a folder each file, of a bucket at Google each
// version of each object.
func stored(t *testing.T, uri string) (all [][]byte) {
	t.Helper()
	u, err := url.Parse(uri)
	must(t, err)
	if dir := u.Query().Get("dir"); dir != "" {
		must(t, filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
			if err == nil && e.Type().IsRegular() {
				var b []byte
				b, err = os.ReadFile(path)
				all = append(all, b)
			}
			return err
		}))
		return all
	}
	bucket := u.Query().Get("endpoint") + "/storage/v1/b/records"
	var list struct {
		Items []struct{ Name, Generation string }
	}
	must(t, json.Unmarshal(fetch(t, http.MethodGet, bucket+"/o?versions=true", ""), &list))
	for _, o := range list.Items {
		all = append(all, fetch(t, http.MethodGet, bucket+"/o/"+url.PathEscape(o.Name)+"?alt=media&generation="+o.Generation, ""))
	}
	return all
}

func fetch(t *testing.T, method, url, body string) []byte {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(body))
	must(t, err)
	resp, err := http.DefaultClient.Do(r)
	must(t, err)
	defer resp.Body.Close()
	out, err := io.ReadAll(resp.Body)
	must(t, err)
	if resp.StatusCode >= 300 {
		t.Fatalf("%s %s: %s %s", method, url, resp.Status, out)
	}
	return out
}

var longHex = regexp.MustCompile(`[0-9a-f]{64}`)

// canBeHad reports whether somebody with the KEK and all that storage holds finds the key: by
// each wrapped key and each salt that is there, and by deriving it without any.
func canBeHad(t *testing.T, uri string, objects [][]byte, dek string) bool {
	t.Helper()
	k, err := setup.KMS(t.Context(), uri)
	must(t, err)
	defer k.Close()
	salts, found := []string{""}, false
	for _, o := range objects {
		for _, s := range longHex.FindAll(o, -1) {
			salts = append(salts, string(s))
		}
	}
	try := func(b kms.Binding, w kms.Wrapped) {
		key, err := k.Unwrap(t.Context(), b, w)
		if err != nil {
			return
		}
		defer key.Close()
		_ = key.Use(func(raw []byte) error { found = found || hex.EncodeToString(raw) == dek; return nil })
	}
	for _, o := range objects {
		var rec struct{ Keys []volume.WrappedDEK }
		if at := bytes.IndexByte(o, '{'); at >= 0 && json.Unmarshal(o[at:], &rec) == nil {
			for _, key := range rec.Keys {
				for _, salt := range salts {
					try(kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: key.Version, Length: key.Length, Salt: salt}, key.Wrapped)
				}
			}
		}
	}
	current, err := k.Current(t.Context())
	must(t, err)
	for version := range uint32(3) {
		for _, salt := range salts {
			for _, scheme := range []string{"hkdf-sha256", "constellation"} {
				try(kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: version + 1, Length: 32, Salt: salt}, kms.Wrapped{Scheme: scheme, KEK: current})
			}
		}
	}
	return found
}

// Neither the service nor its storage yields a retired volume's key, even to someone who has
// the KEK, and neither do its logs.
func TestTheKeyOfARetiredVolumeIsGone(t *testing.T) {
	folder := func(t *testing.T) string { return "storage://file?dir=" + t.TempDir() }
	versioned := func(t *testing.T) string {
		uri := cloud.Google(t).Storage("p")
		u, err := url.Parse(uri)
		must(t, err)
		fetch(t, http.MethodPost, u.Query().Get("endpoint")+"/storage/v1/b?project=project", `{"name":"records"}`)
		fetch(t, http.MethodPatch, u.Query().Get("endpoint")+"/storage/v1/b/records", `{"versioning":{"enabled":true}}`)
		return uri
	}
	for name, c := range map[string]struct {
		kms     func(*testing.T) string
		storage func(*testing.T) string
	}{
		"cluster KMS":                         {nil, folder},
		"cluster KMS, a bucket with versions": {nil, versioned},
		"AWS":                                 {func(t *testing.T) string { return cloud.AWS(t).KMS }, folder},
		"Google, a bucket with versions":      {func(t *testing.T) string { return cloud.Google(t).KMS }, versioned},
		"Azure":                               {func(t *testing.T) string { return cloud.Azure(t).KMS }, folder},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.stop()
			w.cfg.Storage, w.cfg.Audit = c.storage(t), filepath.Join(w.dir, "audit-2.log")
			if c.kms != nil {
				w.cfg.KMS = c.kms(t)
			}
			w.start()
			m, _ := w.granted("[open, format, retire]")
			resp, dek, err := w.get(m, "data-1", openOp)
			must(t, err)
			if !canBeHad(t, w.cfg.KMS, stored(t, w.cfg.Storage), dek) {
				t.Fatal("this search does not find the key of a volume that lives")
			}
			_, err = retire(t, m, resp.GetLease().GetId())
			must(t, err)
			if canBeHad(t, w.cfg.KMS, stored(t, w.cfg.Storage), dek) {
				t.Error("who has the KEK and the storage finds the key of a retired volume")
			}
			_, _, err = w.get(m, "data-1", openOp)
			wantClass(t, err, failure.State)
			log, err := os.ReadFile(w.cfg.Audit)
			must(t, err)
			raw, err := hex.DecodeString(dek)
			must(t, err)
			for _, form := range []string{dek, strings.ToUpper(dek), string(raw), base64.StdEncoding.EncodeToString(raw), base64.RawURLEncoding.EncodeToString(raw)} {
				if strings.Contains(string(log)+w.logged.String(), form) {
					t.Error("a log has the key")
				}
			}
		})
	}
}
