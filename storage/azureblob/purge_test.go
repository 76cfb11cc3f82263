package azureblob

import (
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/storage"
)

// The emulator has snapshots, and no versions.
func TestSnapshotsOfAnObjectAreDestroyed(t *testing.T) {
	a := newAccount(t)
	_, opts := a.behind(t, "records-1")
	opts.CreateContainer = true
	s := open(t, opts)
	for _, name := range []string{"a", "ab"} {
		if _, err := s.Put(t.Context(), name, []byte("x"), storage.Absent); err != nil {
			t.Fatal(err)
		}
		a.call(t, http.MethodPut, "records-1/"+name+"?comp=snapshot", nil)
		a.call(t, http.MethodPut, "records-1/"+name+"?comp=snapshot", nil)
	}
	for _, want := range []int{2, 0} {
		if n, err := s.Purge(t.Context(), "a"); n != want || err != nil {
			t.Errorf("%d: %d, %v", want, n, err)
		}
	}
	if old, _, err := s.earlier(t.Context(), "ab"); len(old) != 2 || err != nil {
		t.Errorf("another one's: %v, %v", old, err)
	}
	if _, _, err := s.Get(t.Context(), "a"); err != nil {
		t.Error(err)
	}
}

// The answers have the form that the reference of List Blobs gives.
func TestVersionsOfAnObjectAreDestroyed(t *testing.T) {
	const first, second = "2026-01-01T00:00:00.1Z", "2026-01-01T00:00:00.2Z"
	one := func(name, version, more string) string {
		return "<Blob><Name>a/b/" + name + "</Name><VersionId>" + version + "</VersionId>" + more + "<Properties><RemainingRetentionDays>7</RemainingRetentionDays></Properties></Blob>"
	}
	current := "<IsCurrentVersion>true</IsCurrentVersion>"
	for name, c := range map[string]struct {
		soft, refuses bool
		purged        int
		want          error
		text          string
	}{
		"versions":         {purged: 2},
		"soft deletion":    {soft: true, purged: 2, want: storage.ErrKept, text: "2, by the account's soft delete for up to 7 days"},
		"an immutable one": {refuses: true, purged: 1, want: storage.ErrKept, text: "1 of 2"},
	} {
		t.Run(name, func(t *testing.T) {
			p, opts := service(t)
			var gone []string
			p.Answer(func(w http.ResponseWriter, r *http.Request) bool {
				q := r.URL.Query()
				version := q.Get("versionid")
				switch {
				case r.Method == http.MethodDelete && c.refuses && version == second:
					return refusal(403, "AuthorizationPermissionMismatch")(w, r)
				case r.Method == http.MethodDelete:
					gone = append(gone, version)
					w.WriteHeader(202)
					return true
				case !strings.Contains(q.Get("include"), "versions"):
					return false
				}
				// The second page, and what begins with the name.
				blobs, marker := one("x", first, ""), "2"
				if q.Get("marker") == "2" {
					blobs, marker = one("x", second, "")+one("x", "2026-01-01T00:00:00.3Z", current)+one("xy", first, ""), ""
				}
				for _, v := range gone {
					deleted := ""
					if c.soft {
						deleted = one("x", v, "<Deleted>true</Deleted>")
					}
					blobs = strings.Replace(blobs, one("x", v, ""), deleted, 1)
				}
				fmt.Fprint(w, "<EnumerationResults><Blobs>"+blobs+"</Blobs><NextMarker>"+marker+"</NextMarker></EnumerationResults>")
				return true
			})
			n, err := open(t, opts).Purge(t.Context(), "x")
			if n != c.purged || !errors.Is(err, c.want) || c.want != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%d, %v", n, err)
			}
			if want := []string{first, second}[:c.purged]; !slices.Equal(gone, want) {
				t.Errorf("%v, want %v", gone, want)
			}
		})
	}
}
