//go:build !keyagent_node

package main

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"filippo.io/age"
	"filippo.io/age/plugin"
	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/shares"
	"github.com/keyagent/keyagent/kms/cluster"
)

// sealedName is what a split writes beside the shares.
const sealedName = "master.sealed"

func newKMSSplit() *cobra.Command {
	cmd := &cobra.Command{
		Use: "split", Short: "Split the master secret among operators",
		Long: `Split the master secret of the cluster KMS among operators.

Each operator gets one share, encrypted to a key of theirs: an age recipient (age1…,
age1pq1…, a plugin's) or an SSH public key. As many of them as the threshold says have the
master secret together, by keyagent kms combine; fewer have nothing. It writes share-1.age and
so on, in the order of the recipients, and master.sealed, which is not secret and is needed
as well: keep it with each share.

The file with the master secret stays as it is.`,
		Example: "  keyagent kms split --file master.secret --threshold 3 --recipient age1… --recipient age1… --recipient \"$(cat ops.pub)\" --recipient age1… --recipient age1… --out shares",
		Args:    cobra.NoArgs,
	}
	flags := cmd.Flags()
	file := flags.String("file", "", "the master secret, raw bytes")
	threshold := flags.Int("threshold", 0, "how many shares are needed, at least 2")
	to := flags.StringArray("recipient", nil, "who gets a share; given once for each")
	out := flags.String("out", "", "folder that is made for the shares")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *file == "" || *out == "" || *threshold == 0 || len(*to) == 0 {
			return failure.Newf(failure.Usage, "see keyagent kms split --help", "--file, --threshold, --recipient and --out must be given")
		}
		var recipients []age.Recipient
		given := map[string]bool{}
		for i, text := range *to {
			r, err := shares.ParseRecipient(text, ageUI(cmd))
			if err != nil {
				return failure.New(failure.Usage, fmt.Errorf("recipient %d: %w", i+1, err), "give an age recipient or an SSH public key")
			}
			if given[text] {
				return failure.Newf(failure.Usage, "who has two shares counts twice", "recipient %d was given before", i+1)
			}
			given[text] = true
			recipients = append(recipients, r)
		}
		return split(cmd.OutOrStdout(), *file, *threshold, recipients, *out)
	}
	return cmd
}

func split(w io.Writer, file string, threshold int, recipients []age.Recipient, out string) error {
	master, err := cluster.LoadMasterSecret(file)
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	defer master.Close()
	sealed, all, err := shares.Split(master, threshold, len(recipients))
	if err != nil {
		return failure.New(failure.Usage, err, "")
	}
	files := map[string][]byte{}
	for i, share := range all {
		defer share.Close()
		if files[fmt.Sprintf("share-%d.age", i+1)], err = share.Encrypt(recipients[i]); err != nil {
			return failure.New(failure.Configuration, err, "")
		}
	}
	if files[sealedName], err = sealed.Encode(); err != nil {
		return err
	}
	// It must come back before anybody relies on it.
	again, err := shares.ParseSealed(files[sealedName])
	if err != nil {
		return err
	}
	back, err := again.Open(all[len(all)-threshold:])
	if err != nil {
		return err
	}
	defer back.Close()
	if !back.Equal(master) {
		return errors.New("another secret comes back than was split")
	}
	if err := os.Mkdir(out, 0o700); err != nil {
		return failure.New(failure.State, err, "name a folder that is not there yet")
	}
	for name, data := range files {
		if err := writeNew(filepath.Join(out, name), data); err != nil {
			return failure.New(failure.Configuration, err, "")
		}
	}
	fmt.Fprintf(w, "%s has %d shares, of which %d are needed, and %s\n", out, len(all), threshold, sealedName)
	return nil
}

func newKMSCombine() *cobra.Command {
	cmd := &cobra.Command{
		Use: "combine SHARE...", Short: "Make the master secret again of operators' shares",
		Long: `Make the master secret again of operators' shares.

Each share is a file of keyagent kms split, with --identity for the key that it is encrypted to,
or what age -d made of one on its operator's own machine. Each is checked first, and one that
is not what was made is named. Use a machine that you trust with all keys: the master secret is
written there.`,
		Example: "  keyagent kms combine --sealed shares/master.sealed --identity key.txt share-1.age share-3.plain share-4.plain --out master.secret",
		Args:    cobra.MinimumNArgs(1),
	}
	flags := cmd.Flags()
	sealedFile := flags.String("sealed", "", "the file master.sealed of the split")
	identities := flags.StringArray("identity", nil, "file of age identities, or an SSH private key; may be repeated")
	out := flags.String("out", "", "file that is written")
	cmd.RunE = func(cmd *cobra.Command, files []string) error {
		if *sealedFile == "" || *out == "" {
			return failure.Newf(failure.Usage, "see keyagent kms combine --help", "--sealed and --out must be given")
		}
		data, err := config.ReadPublicFile(*sealedFile, shares.MaxSealed)
		if err != nil {
			return failure.New(failure.Configuration, err, "")
		}
		sealed, err := shares.ParseSealed(data)
		if err != nil {
			return failure.New(failure.Configuration, err, "it is the file master.sealed of keyagent kms split")
		}
		ids, err := readIdentities(cmd, *identities)
		if err != nil {
			return err
		}
		var all []*shares.Share
		for _, path := range files {
			share, err := readShare(path, ids)
			if err != nil {
				return failure.New(failure.Configuration, fmt.Errorf("%s: %w", path, err), "--identity names the key that it is encrypted to")
			}
			defer share.Close()
			all = append(all, share)
		}
		master, err := sealed.Open(all)
		switch {
		case errors.Is(err, shares.ErrTooFew):
			return failure.New(failure.WrongKey, err, "ask more operators for theirs")
		case err != nil:
			return failure.New(failure.WrongKey, err, "leave out what is wrong, and ask its operator for the right one")
		}
		defer master.Close()
		if err := config.WriteSecretFile(*out, master); errors.Is(err, fs.ErrExist) {
			return failure.New(failure.State, err, "nothing is overwritten: name another file")
		} else if err != nil {
			return failure.New(failure.Configuration, err, "")
		}
		fmt.Fprintf(cmd.OutOrStdout(), "%s has the master secret\n", *out)
		return nil
	}
	return cmd
}

func readIdentities(cmd *cobra.Command, paths []string) (all []age.Identity, err error) {
	for _, path := range paths {
		file, err := config.ReadSecretFile(path, shares.MaxSealed)
		if err != nil {
			return nil, failure.New(failure.Configuration, err, "")
		}
		ids, err := shares.ParseIdentities(file, ageUI(cmd))
		if err := errors.Join(err, file.Close()); err != nil {
			return nil, failure.New(failure.Configuration, fmt.Errorf("%s: %w", path, err), "an SSH key with a passphrase: decrypt the share with age -d, and name what that gives")
		}
		all = append(all, ids...)
	}
	return all, nil
}

func readShare(path string, ids []age.Identity) (*shares.Share, error) {
	encrypted, err := isEncrypted(path)
	if err != nil {
		return nil, err
	}
	if encrypted {
		data, err := config.ReadPublicFile(path, shares.MaxSealed)
		if err != nil {
			return nil, err
		}
		return shares.Decrypt(data, ids)
	}
	text, err := config.ReadSecretFile(path, shares.MaxShare)
	if err != nil {
		return nil, err
	}
	defer text.Close()
	return shares.ParseShare(text)
}

// isEncrypted looks at the beginning of a share's file, which may be no secret.
func isEncrypted(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer f.Close()
	start := make([]byte, 40)
	n, err := io.ReadFull(f, start)
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		err = nil
	}
	return shares.IsEncrypted(start[:n]), err
}

// ageUI lets plugins of age ask on the terminal.
func ageUI(cmd *cobra.Command) *plugin.ClientUI {
	say := func(format string, v ...any) { fmt.Fprintf(cmd.ErrOrStderr(), format+"\n", v...) }
	return plugin.NewTerminalUI(say, say)
}
