package awss3

import (
	"errors"
	"net/http"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/storage"
)

func TestVersionsThatCannotBeDestroyedAreSaid(t *testing.T) {
	for name, c := range map[string]struct {
		refused func(*http.Request) bool
		want    error
		text    string
	}{
		"object lock":                {func(r *http.Request) bool { return r.Method == http.MethodDelete }, storage.ErrKept, "2 of 2"},
		"no permission to list them": {func(r *http.Request) bool { return r.URL.Query().Has("versions") }, storage.ErrDenied, "s3:ListBucketVersions"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newService(t)
			kept := s.versions(t)()
			st := s.open(t)
			v := storage.Absent
			for range 3 {
				var err error
				if v, err = st.Put(t.Context(), "x", []byte("x"), v); err != nil {
					t.Fatal(err)
				}
			}
			s.plays(func(w http.ResponseWriter, r *http.Request, _ http.Handler) bool {
				return c.refused(r) && refusal(w, 403, "AccessDenied")
			})
			n, err := st.Purge(t.Context(), "x")
			if n != 0 || !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%d, %v", n, err)
			}
			s.plays(func(http.ResponseWriter, *http.Request, http.Handler) bool { return false })
			if n := kept("x"); n != 2 {
				t.Errorf("%d are left", n)
			}
		})
	}
}
