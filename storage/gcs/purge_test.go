package gcs

import (
	"errors"
	"fmt"
	"net/http"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/storage"
)

func TestWhatABucketKeepsIsSaid(t *testing.T) {
	for name, c := range map[string]struct {
		soft, refuses bool
		purged        int
		want          error
		text          string
	}{
		"versions":                   {purged: 2},
		"a bucket that soft-deletes": {soft: true, purged: 2, want: storage.ErrKept, text: "1, by the bucket's soft delete policy until 2026-12-05T00:00:00Z"},
		"a retention policy":         {refuses: true, want: storage.ErrKept, text: "2 of 2"},
	} {
		t.Run(name, func(t *testing.T) {
			deleted := 0
			p := service(t, func(w http.ResponseWriter, r *http.Request) bool {
				q := r.URL.Query()
				switch {
				case r.Method == http.MethodDelete && c.refuses:
					return refuse(w, 403, "retentionPolicyNotMet")
				case r.Method == http.MethodDelete:
					deleted++
					w.WriteHeader(204)
				case q.Get("versions") == "true" && q.Get("pageToken") == "":
					fmt.Fprint(w, `{"items":[{"name":"a/b/x","generation":"1","timeDeleted":"2026-11-28T00:00:00Z"}],"nextPageToken":"2"}`)
				case q.Get("versions") == "true":
					fmt.Fprint(w, `{"items":[{"name":"a/b/x","generation":"2","timeDeleted":"2026-11-28T00:00:00Z"},{"name":"a/b/x","generation":"3"},{"name":"a/b/xy","generation":"1","timeDeleted":"2026-11-28T00:00:00Z"}]}`)
				case q.Get("softDeleted") == "true" && c.soft:
					fmt.Fprint(w, `{"items":[{"name":"a/b/x","generation":"1","hardDeleteTime":"2026-12-05T00:00:00Z"}]}`)
				default:
					return false
				}
				return true
			})
			s := open(t, options(p))
			n, err := s.Purge(t.Context(), "x")
			if n != c.purged || deleted != n || !errors.Is(err, c.want) || c.want != nil && !strings.Contains(err.Error(), c.text) {
				t.Errorf("%d of %d, %v", n, deleted, err)
			}
		})
	}
}
