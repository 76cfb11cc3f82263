package encryption

import (
	"fmt"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/failure"
)

// Timing is how the plugins were started.
type Timing struct {
	Refresh      time.Duration // how often they ask their source
	Observations int           // of another KEK, until it encrypts
	KeepOld      time.Duration // how long they keep decrypting with a KEK the source no longer returns
}

// Step is one of a rotation.
type Step struct {
	What    string        `json:"what"`
	Command string        `json:"command,omitempty"`
	Wait    time.Duration `json:"wait_ns,omitempty"` // before the next step
	Why     string        `json:"why,omitempty"`
}

// Rotation is the order of steps for one plugin.
type Rotation struct {
	Plugin    string   `json:"plugin"`
	API       string   `json:"api"`
	Resources []string `json:"resources"`
	Steps     []Step   `json:"steps"`
	// Total is how long the waits are together, without the work.
	Total time.Duration `json:"total_ns"`
}

// Plan returns how the KEK of each plugin that writes is rotated. It is an error if
// no plugin writes: there is nothing to rotate then.
func Plan(f *File, t Timing) ([]Rotation, error) {
	var out []Rotation
	for _, r := range f.Resources {
		if len(r.Providers) == 0 || r.Providers[0].KMS == nil {
			continue
		}
		out = append(out, rotation(r, t))
	}
	if len(out) == 0 {
		return nil, failure.Newf(failure.Configuration, "keyagent kubekms doctor says what is wrong", "no KMS plugin comes first in a list of providers: none writes")
	}
	return out, nil
}

func rotation(r Resources, t Timing) Rotation {
	k := r.Providers[0].KMS
	v2 := k.version() == "v2"
	promotion := t.Refresh * time.Duration(t.Observations)
	var steps []Step
	step := func(what, command string, wait time.Duration, why string) {
		steps = append(steps, Step{what, command, wait, why})
	}
	step("Back etcd up, and make sure that every control-plane node is healthy and has the KEK in force.",
		"kubectl get --raw /readyz/kms-providers", 0, "a rotation repairs nothing")
	step("Keep the KEK in force readable beyond this rotation: it stays in the wrapped file, or its command becomes an --old-command of every plugin, which is then restarted, one node after the other.",
		"", 0, fmt.Sprintf("a plugin keeps a KEK that its source no longer returns for %s, and loses it when it restarts", t.KeepOld))
	step("Change the KEK at its source, for every node.",
		"keyagent kubekms rotate --kms URI --wrapped-kek FILE   # or what --command reads", t.Refresh+time.Minute,
		fmt.Sprintf("every plugin fetches within %s, and can then decrypt with the new KEK whatever another node writes", t.Refresh))
	step("Wait until every plugin encrypts with the new KEK.", "", max(0, promotion-t.Refresh),
		fmt.Sprintf("it takes %d fetches in a row, %s apart", t.Observations, t.Refresh))
	if v2 {
		step("Wait until every API server uses it.", "", WriteGrace+StatusPoll,
			fmt.Sprintf("they ask for the key_id each %s, and may write under the old one for %s if they cannot", StatusPoll, WriteGrace))
		step("Check that all of them agree: one hash of a key_id per API server, and the same.",
			"kubectl get --raw /metrics | grep apiserver_envelope_encryption_key_id_hash", 0, "an API server that lags behind would write the old KEK again")
	}
	for _, name := range r.Resources {
		step(fmt.Sprintf("Rewrite every object of %s.", name), rewrite(name), 0, "an object stays under its KEK until it is written")
	}
	step("Look for what is left: an error in this command is an object that does not decrypt.",
		"kubectl get "+kubectlName(r.Resources)+" -A -o name >/dev/null", 0, "")
	if len(r.Providers) > 1 {
		step("Take the providers behind the first out of the file, on one API server after the other.", "", reloadPoll,
			"they only read; once everything is rewritten they can only do harm")
	}
	step("Forget the old KEK when no backup of etcd that may be needed is under it.",
		"keyagent kubekms forget --before VERSION --objects-are-rewritten --kms URI --wrapped-kek FILE   # or drop --old-command", 0,
		"a backup is worth nothing without its KEK")
	out := Rotation{Plugin: k.Name, API: k.version(), Resources: r.Resources, Steps: steps}
	for _, s := range steps {
		out.Total += s.Wait
	}
	return out
}

func rewrite(resource string) string {
	if strings.HasPrefix(resource, "*") {
		return "a StorageVersionMigration for each resource of " + resource
	}
	return fmt.Sprintf("kubectl get %s -A -o json | kubectl replace -f -", resource)
}

func kubectlName(resources []string) string {
	var out []string
	for _, r := range resources {
		if !strings.HasPrefix(r, "*") {
			out = append(out, r)
		}
	}
	if len(out) == 0 {
		return "secrets"
	}
	return strings.Join(out, ",")
}
