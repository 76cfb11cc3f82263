package node

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/keyagent/keyagent/attestation/policy"
	"github.com/keyagent/keyagent/attestation/snp"
	"github.com/keyagent/keyagent/attestation/tpm"
	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
)

// One image serves many machines, and what is measured with it cannot say which volume
// is a machine's own. So the ID of a volume may have a word in braces, which stands for
// something of the machine. What a machine says of itself here decides nothing: it asks
// for a volume of that name, and the key service's policy compares the name with what
// the evidence says.

// Where the firmware's and the kernel's words are. Both are the host's.
const (
	smbios      = "/sys/class/dmi/id/"
	commandLine = "/proc/cmdline"
)

// maxWord bounds a value in bytes, with room for a SHA-256 in hex.
const maxWord = 64

// words are what may stand in braces; cmdline.NAME is the value of keyagent.NAME= on the
// kernel's command line.
var words = map[string]func(context.Context, *Config) (string, error){
	"tpm.ek": func(ctx context.Context, c *Config) (string, error) {
		opts, err := c.TPM.Options()
		if err != nil {
			return "", err
		}
		opts.AK = tpm.AKOwn // a cloud's attestation key has no EK in its evidence
		i, err := tpm.NewIssuer(opts)
		if err != nil {
			return "", err
		}
		return i.EK(ctx)
	},
	"snp.identity": func(ctx context.Context, _ *Config) (string, error) {
		i, err := snp.NewIssuer(snp.IssuerOptions{})
		if err != nil {
			return "", err
		}
		return i.Identity(ctx)
	},
	"smbios.uuid":   fromFile(smbios + "product_uuid"),
	"smbios.serial": fromFile(smbios + "product_serial"),
	"smbios.asset":  fromFile(smbios + "board_asset_tag"), // EC2: the instance's ID
}

const fromCommandLine = "cmdline."

func fromFile(path string) func(context.Context, *Config) (string, error) {
	return func(context.Context, *Config) (string, error) {
		data, err := config.ReadPublicFile(path, 4<<10)
		return strings.ToLower(strings.TrimSpace(string(data))), err
	}
}

func fromKernel(name string) (string, error) {
	data, err := os.ReadFile(commandLine)
	if err != nil {
		return "", err
	}
	return inCommandLine(string(data), name)
}

func inCommandLine(line, name string) (string, error) {
	for word := range strings.FieldsSeq(line) {
		if value, ok := strings.CutPrefix(word, "keyagent."+name+"="); ok {
			return value, nil
		}
	}
	return "", fmt.Errorf("the kernel's command line has no keyagent.%s=", name)
}

// fill replaces the words in braces of an ID.
func fill(id string, value func(word string) (string, error)) (string, error) {
	var out strings.Builder
	for rest := id; rest != ""; {
		before, after, found := strings.Cut(rest, "{")
		out.WriteString(before)
		if !found {
			break
		}
		word, next, closed := strings.Cut(after, "}")
		if !closed {
			return "", errors.New("a brace is not closed")
		}
		text, err := value(word)
		if err != nil {
			return "", err
		}
		out.WriteString(text)
		rest = next
	}
	return out.String(), nil
}

// known refuses words that there are not, and stands in for those that there are, so
// that the rest of an ID can be checked on any machine.
func known(word string) (string, error) {
	if name, ok := strings.CutPrefix(word, fromCommandLine); ok && name != "" && policy.ValidVolume(name) {
		return "x", nil
	}
	if words[word] == nil {
		return "", fmt.Errorf("{%.40s} is not one of %s, cmdline.NAME", word, strings.Join(slices.Sorted(maps.Keys(words)), ", "))
	}
	return "x", nil
}

// describe checks a volume whose ID may have words in braces.
func (v *Volume) describe() error {
	if !strings.ContainsAny(v.ID, "{}") {
		return v.Validate()
	}
	id := v.ID
	var err error
	if v.ID, err = fill(id, known); err != nil {
		return &FieldError{"id", -1, err}
	}
	if v.Name == "" {
		return &FieldError{"name", -1, errors.New("must be set where the ID is the machine's own: names of mappings are short")}
	}
	after := v.After
	v.After = slices.Clone(after)
	for n := range v.After {
		if v.After[n], err = fill(v.After[n], known); err != nil {
			return &FieldError{"after", n, err}
		}
	}
	err = v.Validate()
	v.ID, v.After = id, after
	return err
}

// Resolve replaces what stands in braces in the IDs of volumes by what it is on this
// machine. Without it such a volume is not one that anybody can ask for.
func (c *Config) Resolve(ctx context.Context) error {
	values := map[string]string{}
	value := func(word string) (string, error) {
		if v, ok := values[word]; ok {
			return v, nil
		}
		v, err := c.word(ctx, word)
		if err == nil && (v == "" || len(v) > maxWord || !policy.ValidVolume(v)) {
			err = fmt.Errorf("%.80q cannot be a part of a volume's ID", v)
		}
		if err != nil {
			return "", fmt.Errorf("{%s}: %w", word, err)
		}
		values[word] = v
		return v, nil
	}
	for i := range c.Volumes {
		v := &c.Volumes[i]
		id, err := fill(v.ID, value)
		if err != nil {
			return failure.New(failure.Of(err).Class, fmt.Errorf("volumes[%d]: id: %w", i, err), "")
		}
		v.ID = id
		for n := range v.After {
			if v.After[n], err = fill(v.After[n], value); err != nil {
				return failure.New(failure.Of(err).Class, fmt.Errorf("volumes[%d]: after[%d]: %w", i, n, err), "")
			}
		}
	}
	for i := range c.KeySocket.Consumers {
		one := &c.KeySocket.Consumers[i]
		id, err := fill(one.Volume, value)
		if err != nil {
			return failure.New(failure.Of(err).Class, fmt.Errorf("key_socket.consumers[%d]: volume: %w", i, err), "")
		}
		one.Volume = id
	}
	if i, err := CheckVolumes(c.Volumes); err != nil {
		return failure.New(failure.Configuration, fmt.Errorf("volumes[%d], on this machine: %w", i, err), "")
	}
	return nil
}

func (c *Config) word(ctx context.Context, word string) (string, error) {
	if name, ok := strings.CutPrefix(word, fromCommandLine); ok {
		return fromKernel(name)
	}
	return words[word](ctx, c)
}
