package main

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/test/sim/cloud"
)

// keyagent kms check finds nothing to say on a cloud where everything is allowed,
// leaves nothing behind, and otherwise names the permission as the cloud does.
func TestKMSCheckNamesTheMissingPermission(t *testing.T) {
	for name, start := range cloud.Shapes {
		t.Run(name, func(t *testing.T) {
			shape := start(t)
			var out, errs bytes.Buffer
			if code := run([]string{"kms", "check", shape.KMS, shape.Storage("p")}, &out, &errs); code != 0 || strings.Contains(out.String(), "FAILED") {
				t.Fatalf("exit code %d: %s%s", code, &out, &errs)
			}
			t.Logf("everything is allowed:\n%s", &out)
			shape.Deny()
			out.Reset()
			code := run([]string{"kms", "check", shape.KMS}, &out, &errs)
			if code != failure.ExitCode(failure.Configuration) {
				t.Errorf("exit code %d", code)
			}
			if want := `make a key +FAILED: .*missing permission: .*` + regexp.QuoteMeta(shape.Permission); !regexp.MustCompile(want).MatchString(out.String()) {
				t.Errorf("it does not say %q: %s", want, &out)
			}
			stop := shape.Gone()
			defer stop()
			out.Reset()
			if code := run([]string{"kms", "check", "--output", "json", shape.Storage("p")}, &out, &errs); code != failure.ExitCode(failure.Configuration) {
				t.Errorf("exit code %d without the bucket: %s", code, &out)
			}
		})
	}
}
