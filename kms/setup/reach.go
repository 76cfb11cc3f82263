package setup

import (
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"

	"github.com/keyagent/keyagent/kms"
)

// Reach is what a backend touches of the machine that it runs on, besides the network:
// for programs that give up all else.
type Reach struct {
	// Read are files that parameters name, and Write folders that are written.
	Read, Write []string
	// Anything may be read: the cloud's library looks for credentials where the
	// environment and its own files say.
	Anything bool
	// Commands: a command of the operator's runs, which may do anything.
	Commands bool
}

// elsewhere are the clouds' own words for where those folders are, if not in the home.
var elsewhere = map[string]func(path string) string{
	"AZURE_CONFIG_DIR": filepath.Clean, "CLOUDSDK_CONFIG": filepath.Clean,
	"AWS_CONFIG_FILE": filepath.Dir, "AWS_SHARED_CREDENTIALS_FILE": filepath.Dir,
}

// ReachOf returns what the backend that uri names will touch. It opens nothing, and
// leaves it to [KMS] and [Storage] to refuse parameters.
func ReachOf(uri string) (r Reach, err error) {
	u, err := kms.ParseURI(uri)
	if err != nil {
		return r, err
	}
	_, query, _ := strings.Cut(uri, "?")
	parameters, err := url.ParseQuery(query)
	if err != nil {
		return r, fmt.Errorf("%w: its parameters are not properly escaped", kms.ErrURI)
	}
	for name := range parameters {
		switch value := parameters.Get(name); {
		case name == "wrappedBy":
			by, err := ReachOf(value)
			if err != nil {
				return r, fmt.Errorf("wrappedBy: %w", err)
			}
			r.Read, r.Write = append(r.Read, by.Read...), append(r.Write, by.Write...)
			r.Anything, r.Commands = r.Anything || by.Anything, r.Commands || by.Commands
		case name == "dir":
			r.Write = append(r.Write, value)
		case name == "credentialsPath", strings.HasSuffix(strings.ToLower(name), "file"):
			r.Read = append(r.Read, value)
		case strings.HasSuffix(strings.ToLower(name), "command"):
			r.Commands = true
		}
	}
	switch u.Name {
	case "command":
		r.Commands = true
	case "aws", "azure", "gcp":
		// The libraries keep tokens of a person's login there, and so do the programs that
		// they run for credentials.
		r.Anything = true
		r.Write = append(r.Write, os.TempDir())
		for name, folder := range elsewhere {
			if path := os.Getenv(name); path != "" {
				r.Write = append(r.Write, folder(path))
			}
		}
		if home, err := os.UserHomeDir(); err == nil {
			for _, dir := range []string{".aws", ".azure", ".config/gcloud"} {
				r.Write = append(r.Write, filepath.Join(home, dir))
			}
		}
	}
	return r, nil
}
