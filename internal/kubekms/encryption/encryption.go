// Package encryption reads an EncryptionConfiguration of kube-apiserver and says what
// is wrong with it for a KMS plugin, and how a rotation goes under it.
//
// [Read] is strict: a field that kube-apiserver does not know is an error, as it is
// there. [Diagnose] finds what kube-apiserver refuses, and what it accepts although
// nobody wants it: plaintext that is written, a provider that hides what is behind it,
// keys in the file, times that do not go together. [Plan] prints the safe order of a
// rotation. Nothing here opens a socket or talks to a cluster, and no finding repeats a
// secret of the file.
package encryption

import (
	"fmt"
	"strings"
	"time"

	"github.com/keyagent/keyagent/internal/config"
)

// What a configuration must say.
const (
	apiVersion = "apiserver.config.k8s.io/v1"
	kind       = "EncryptionConfiguration"
	// What it was called in 2018, and kube-apiserver still takes.
	oldAPIVersion = "v1"
	oldKind       = "EncryptionConfig"
)

// The times of kube-apiserver (k8s.io/apiserver, encryptionconfig).
const (
	defaultTimeout   = 3 * time.Second
	defaultCacheSize = 1000
	// StatusPoll is how often a healthy plugin of v2 is asked for its Status.
	StatusPoll = time.Minute
	// WriteGrace is for how long objects are written under the old key_id although
	// Status cannot be had.
	WriteGrace = 3 * time.Minute
	// reloadPoll is how often a changed file is noticed where it is reloaded.
	reloadPoll = time.Minute
)

// File is an EncryptionConfiguration.
type File struct {
	APIVersion string      `yaml:"apiVersion"`
	Kind       string      `yaml:"kind"`
	Resources  []Resources `yaml:"resources"`

	doc *config.Document
}

// Resources are kinds of objects, and what reads and writes them: the first provider
// writes, all of them read.
type Resources struct {
	Resources []string   `yaml:"resources"`
	Providers []Provider `yaml:"providers"`
}

// Provider is exactly one of its fields.
type Provider struct {
	AESGCM    *Keys     `yaml:"aesgcm"`
	AESCBC    *Keys     `yaml:"aescbc"`
	Secretbox *Keys     `yaml:"secretbox"`
	Identity  *struct{} `yaml:"identity"`
	KMS       *KMS      `yaml:"kms"`
}

// Keys are keys that stand in the file.
type Keys struct {
	Keys []struct {
		Name   string `yaml:"name"`
		Secret string `yaml:"secret"`
	} `yaml:"keys"`
}

// KMS is a plugin.
type KMS struct {
	APIVersion string `yaml:"apiVersion"`
	Name       string `yaml:"name"`
	CacheSize  *int   `yaml:"cachesize"`
	Endpoint   string `yaml:"endpoint"`
	Timeout    string `yaml:"timeout"`
}

// timeout returns what is set, or kube-apiserver's default.
func (k *KMS) timeout() (time.Duration, error) {
	if k.Timeout == "" {
		return defaultTimeout, nil
	}
	return time.ParseDuration(k.Timeout)
}

// version is what kube-apiserver takes if none is set.
func (k *KMS) version() string {
	if k.APIVersion == "" {
		return "v1"
	}
	return k.APIVersion
}

// name is the kind of a provider, empty unless it is exactly one.
func (p *Provider) name() string {
	var names []string
	for _, one := range []struct {
		name string
		set  bool
	}{{"aesgcm", p.AESGCM != nil}, {"aescbc", p.AESCBC != nil}, {"secretbox", p.Secretbox != nil}, {"identity", p.Identity != nil}, {"kms", p.KMS != nil}} {
		if one.set {
			names = append(names, one.name)
		}
	}
	if len(names) != 1 {
		return ""
	}
	return names[0]
}

// keys are those in the file, if it is a provider of such.
func (p *Provider) keys() *Keys {
	switch {
	case p.AESGCM != nil:
		return p.AESGCM
	case p.AESCBC != nil:
		return p.AESCBC
	}
	return p.Secretbox
}

// Read reads a file. Its errors wrap config.ErrInvalid and name the line.
func Read(path string) (*File, error) {
	f := &File{}
	doc, _, err := config.ReadFile(path, f)
	if err != nil {
		return nil, err
	}
	return f.checked(doc)
}

// Parse is Read for bytes; name stands in errors.
func Parse(name string, data []byte) (*File, error) {
	f := &File{}
	doc, err := config.Decode(name, data, f)
	if err != nil {
		return nil, err
	}
	return f.checked(doc)
}

func (f *File) checked(doc *config.Document) (*File, error) {
	f.doc = doc
	if f.old() {
		return f, nil
	}
	if f.APIVersion != apiVersion {
		return nil, doc.Errorf([]any{"apiVersion"}, "it is %.64q, not %s", f.APIVersion, apiVersion)
	}
	if f.Kind != kind {
		return nil, doc.Errorf([]any{"kind"}, "it is %.64q, not %s", f.Kind, kind)
	}
	return f, nil
}

// old reports that the file has the head of 2018.
func (f *File) old() bool { return f.APIVersion == oldAPIVersion && f.Kind == oldKind }

// covers reports that a pattern of resources includes secrets.
func covers(pattern string) bool {
	return pattern == "secrets" || pattern == "*." || pattern == "*.*"
}

// where names a place in the file.
func where(path ...any) string {
	var b strings.Builder
	for _, step := range path {
		switch s := step.(type) {
		case int:
			fmt.Fprintf(&b, "[%d]", s)
		case string:
			if b.Len() > 0 {
				b.WriteByte('.')
			}
			b.WriteString(s)
		}
	}
	return b.String()
}
