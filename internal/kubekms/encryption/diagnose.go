package encryption

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// Severity is how bad a finding is.
type Severity string

// The severities.
const (
	Refused Severity = "refused" // kube-apiserver does not start with it
	Danger  Severity = "danger"  // it starts, and secrets are not as safe as they seem
	Advice  Severity = "advice"
)

// Finding is one thing that is wrong.
type Finding struct {
	Severity Severity `json:"severity"`
	Where    string   `json:"where"`
	What     string   `json:"what"`
}

// findings collects them in the order of the file.
type findings []Finding

func (f *findings) add(s Severity, where, format string, args ...any) {
	*f = append(*f, Finding{s, where, fmt.Sprintf(format, args...)})
}

// Diagnose returns what is wrong, in the order of the file.
func Diagnose(f *File) []Finding {
	var out findings
	if f.old() {
		out.add(Advice, "apiVersion", "this is the head of 2018: write apiVersion: %s and kind: %s", apiVersion, kind)
	}
	if len(f.Resources) == 0 {
		out.add(Refused, "resources", "there are none")
	}
	names, seen := map[string]string{}, map[string]string{}
	secrets := false
	for i, r := range f.Resources {
		at := where("resources", i)
		out.resources(at, r, seen)
		secrets = secrets || slices.ContainsFunc(r.Resources, covers)
		out.providers(at, r, names)
	}
	if !secrets && len(f.Resources) > 0 {
		out.add(Danger, "resources", "secrets are in no list: they are written in plaintext")
	}
	return out
}

// unreachable are resources of the API server's own.
var unreachable = []string{"apiserveripinfo", "serviceipallocations", "servicenodeportallocations"}

// resources checks the names of one list. seen are those of the lists before.
func (f *findings) resources(at string, r Resources, seen map[string]string) {
	at += ".resources"
	if len(r.Resources) == 0 {
		f.add(Refused, at, "the list is empty")
	}
	groups := map[string]int{}
	for _, name := range r.Resources {
		_, group, _ := strings.Cut(name, ".")
		groups[group]++
	}
	for j, name := range r.Resources {
		here := where(at, j)
		resource, group, _ := strings.Cut(name, ".")
		switch {
		case strings.ToLower(name) != name:
			f.add(Refused, here, "%.128q has capital letters", name)
		case name == "*":
			f.add(Refused, here, "\"*\" means nothing: \"*.\" is the core group, \"*.*\" everything")
		case slices.Contains(r.Resources[:j], name):
			f.add(Refused, here, "%.128q stands in this list twice", name)
		case name == "*.*" && len(r.Resources) > 1, resource == "*" && groups[group] > 1:
			f.add(Refused, here, "%.128q and another name of this list overlap", name)
		case group == "*" && resource != "*":
			f.add(Refused, here, "%.128q: one resource of every group cannot be named", name)
		case slices.Contains(unreachable, name):
			f.add(Refused, here, "%.128q has no API, and cannot be encrypted", name)
		case group == "extensions" || group == "events.k8s.io":
			f.add(Refused, here, "%.128q: there are no objects under this group in etcd", name)
		}
		if before, ok := seen[name]; ok && !strings.HasPrefix(before, at) {
			f.add(Danger, here, "%.128q is in %s too, which wins: this entry does nothing for it", name, before)
		} else if before, ok := seen["*.*"]; ok && !strings.HasPrefix(before, at) {
			f.add(Danger, here, "\"*.*\" of %s wins: this entry does nothing for %.128q", before, name)
		}
		if _, ok := seen[name]; !ok {
			seen[name] = here
		}
	}
}

// providers checks those of one entry. names are those of plugins before.
func (f *findings) providers(at string, r Resources, names map[string]string) {
	at += ".providers"
	if len(r.Providers) == 0 {
		f.add(Refused, at, "the list is empty")
		return
	}
	kinds := make([]string, len(r.Providers))
	for j := range r.Providers {
		p := &r.Providers[j]
		here := where(at, j)
		kinds[j] = p.name()
		switch kinds[j] {
		case "":
			f.add(Refused, here, "an element is exactly one of aesgcm, aescbc, secretbox, identity and kms")
		case "kms":
			f.kms(where(here, "kms"), p.KMS, names)
		case "identity":
		default:
			f.keys(where(here, kinds[j]), kinds[j], p.keys())
		}
	}
	f.order(at, r, kinds)
}

// order is about what the first provider writes and the others read.
func (f *findings) order(at string, r Resources, kinds []string) {
	first := where(at, 0)
	sensitive := slices.ContainsFunc(r.Resources, covers)
	switch kinds[0] {
	case "identity":
		if sensitive {
			f.add(Danger, first, "identity comes first: secrets are written in plaintext")
		} else if len(kinds) > 1 {
			f.add(Advice, first, "identity comes first: these objects are written in plaintext")
		}
	case "aesgcm", "aescbc", "secretbox":
		f.add(Danger, first, "the key that writes stands in this file: anyone who reads the disk of the control plane reads etcd")
	}
	for j, k := range kinds {
		if k == "identity" && j > 0 {
			f.add(Advice, where(at, j), "identity is for the time until every object is rewritten: while it is here, what somebody puts into etcd in plaintext is believed")
			if j < len(kinds)-1 {
				f.add(Danger, where(at, j), "identity reads everything that has no prefix of another provider: put it last")
			}
		}
	}
}

func (f *findings) kms(at string, k *KMS, names map[string]string) {
	switch v := k.version(); {
	case v != "v1" && v != "v2":
		f.add(Refused, at+".apiVersion", "unknown version %.64q: it is v1 or v2", v)
	case v == "v1":
		f.add(Advice, at+".apiVersion", "v1 is deprecated and off unless the feature gate KMSv1 is set; it calls the plugin for every write")
		if k.CacheSize != nil && *k.CacheSize == 0 {
			f.add(Refused, at+".cachesize", "it is 0: a positive number, or a negative one for no cache")
		}
	default:
		if k.CacheSize != nil {
			f.add(Refused, at+".cachesize", "v2 has none")
		}
		if strings.Contains(k.Name, ":") {
			f.add(Refused, at+".name", "a name in v2 has no colon")
		}
	}
	before, used := names[k.Name]
	switch {
	case k.Name == "":
		f.add(Refused, at+".name", "it is missing")
	case used:
		f.add(Refused, at+".name", "%.64q is the name in %s too (in v1 alone it is accepted, unless the file is reloaded)", k.Name, before)
	default:
		names[k.Name] = at
	}
	f.endpoint(at+".endpoint", k.Endpoint)
	switch d, err := k.timeout(); {
	case err != nil || d <= 0:
		f.add(Refused, at+".timeout", "%.64q is no duration above zero", k.Timeout)
	case d > 10*time.Second:
		f.add(Advice, at+".timeout", "%s: a plugin that hangs holds each request of the API server for so long; the default is %s", d, defaultTimeout)
	case d < 100*time.Millisecond:
		f.add(Advice, at+".timeout", "%s is short for a busy node; the default is %s", d, defaultTimeout)
	}
}

func (f *findings) endpoint(at, endpoint string) {
	u, err := url.Parse(endpoint)
	switch {
	case endpoint == "":
		f.add(Refused, at, "it is missing")
	case err != nil:
		f.add(Refused, at, "%.128q is no URL", endpoint)
	case u.Scheme != "unix":
		f.add(Refused, at, "%.128q: only unix sockets are possible", endpoint)
	case u.Path == "" || u.Path == "/" || u.Host != "":
		f.add(Danger, at, "%.128q names no path, and kube-apiserver will find nothing there (unix:///PATH, or unix:///@NAME of an abstract socket)", endpoint)
	case strings.HasPrefix(u.Path, "/@"):
		f.add(Advice, at, "an abstract socket has no permissions: any process of the network namespace can take its name first")
	case strings.HasPrefix(u.Path, "/tmp/"), strings.HasPrefix(u.Path, "/var/tmp/"), strings.HasPrefix(u.Path, "/dev/shm/"):
		f.add(Danger, at, "%.128q is in a folder where everybody can put a socket of their own", endpoint)
	}
}

func (f *findings) keys(at, provider string, k *Keys) {
	at += ".keys"
	if len(k.Keys) == 0 {
		f.add(Refused, at, "there are none")
	}
	allowed := []int{16, 24, 32}
	if provider == "secretbox" {
		allowed = []int{32}
	}
	for i, one := range k.Keys {
		here := where(at, i)
		if one.Name == "" {
			f.add(Refused, here+".name", "it is missing")
		}
		// A secret is decoded to know its length, and shown nowhere.
		switch raw, err := base64.StdEncoding.DecodeString(one.Secret); {
		case one.Secret == "":
			f.add(Refused, here+".secret", "it is missing")
		case err != nil:
			f.add(Refused, here+".secret", "it is not base64")
		case !slices.Contains(allowed, len(raw)):
			f.add(Refused, here+".secret", "it has %d bytes, allowed are %v", len(raw), allowed)
		}
	}
}
