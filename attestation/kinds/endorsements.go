package kinds

import (
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/endorsement"
	"github.com/keyagent/keyagent/attestation/snp"
)

// EndorsementConfig says where endorsements come from, in the configuration of
// nodes and of the key service.
type EndorsementConfig struct {
	// Cache is a folder that keeps them. Empty: memory only.
	Cache string `yaml:"cache,omitempty"`
	// Ask names the vendors that may be asked: amd, intel, or none.
	Ask []string `yaml:"ask,omitempty"`
	// Mirrors answer instead of a vendor, by its name.
	Mirrors map[string]string `yaml:"mirrors,omitempty"`
}

// vendors are whom endorsements come from, by name.
var vendors = map[string][]string{
	"amd":   {snp.KDS},
	"intel": {"https://api.trustedservices.intel.com", "https://certificates.trustedservices.intel.com"},
}

const nobody = "none"

// Check says what is wrong with the section.
func (c EndorsementConfig) Check() error {
	if c.Cache != "" && !filepath.IsAbs(c.Cache) {
		return fmt.Errorf("cache: must be an absolute path")
	}
	for _, name := range c.Ask {
		if _, ok := vendors[name]; !ok && (name != nobody || len(c.Ask) > 1) {
			return fmt.Errorf("ask: %q is not a vendor (hint: amd, intel, or none alone)", name)
		}
	}
	for name, base := range c.Mirrors {
		u, err := url.Parse(base)
		if _, ok := vendors[name]; !ok || err != nil || u.Host == "" {
			return fmt.Errorf("mirrors: %q: %q must be the URL of a mirror of amd or intel", name, base)
		}
	}
	return nil
}

// Memory returns what keeps vendors' words that were seen, in the cache's folder if there
// is one. The caller closes it.
func (c EndorsementConfig) Memory() (*endorsement.Memory, error) {
	if c.Cache == "" {
		return &endorsement.Memory{}, nil
	}
	return endorsement.OpenMemory(c.Cache)
}

// Open returns the source that the section describes. The caller closes it.
// Without a word on whom to ask, those of unset are.
func (c EndorsementConfig) Open(unset ...string) (*endorsement.Cache, error) {
	if err := c.Check(); err != nil {
		return nil, err
	}
	ask := c.Ask
	if len(ask) == 0 {
		ask = unset
	}
	opts := endorsement.CacheOptions{Dir: c.Cache}
	http := endorsement.HTTPOptions{Mirrors: map[string]string{}}
	for _, name := range ask {
		http.Hosts = append(http.Hosts, vendors[name]...)
	}
	for name, base := range c.Mirrors {
		for _, origin := range vendors[name] {
			if slices.Contains(http.Hosts, origin) {
				http.Mirrors[origin] = strings.TrimSuffix(base, "/")
			}
		}
	}
	if len(http.Hosts) > 0 {
		source, err := endorsement.NewHTTP(http)
		if err != nil {
			return nil, err
		}
		opts.Source = source
	}
	return endorsement.NewCache(opts)
}
