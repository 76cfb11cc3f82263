//go:build !keyagent_node

package main

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/config"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/macstore"
	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/setup"
)

func newKMS() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kms",
		Short: "Operate on key-encryption keys, and on the records that they wrap",
		Args:  cobra.NoArgs,
		RunE:  func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(newKMSCheck(), newKMSStatus(), newKMSRewrap(), newKMSRotate(), newKMSRecipient(), newKMSExport(), newKMSImport(), newKMSWrapSecret(), newKMSSplit(), newKMSCombine(), newKMSUnseal())
	return cmd
}

// backendFlags name a KMS and a storage, by flags or by the configuration of the
// key service.
type backendFlags struct {
	config    string
	kms       string
	old       []string
	storage   string
	recordKey string
}

func (f *backendFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.config, "config", "", "take what is not given here from this file of keyagent serve (default "+serveConfig+", if neither --kms nor --storage is given)")
	cmd.Flags().StringVar(&f.kms, "kms", "", "kms:// URI")
	cmd.Flags().StringArrayVar(&f.old, "old-kms", nil, "kms:// URI of a KEK that keys may still be under; may be repeated")
	cmd.Flags().StringVar(&f.storage, "storage", "", "storage:// URI")
	cmd.Flags().StringVar(&f.recordKey, "record-key", "", "ID that the record MAC key must have, as keyagent kms status prints it")
}

// records is what can be done with all records at once: by the key service that runs,
// on its admin socket, or on the storage itself.
type records interface {
	Status(context.Context) (*keyservice.Status, error)
	Rewrap(context.Context, func(macstore.Progress)) (macstore.Progress, error)
	Export(ctx context.Context, w io.Writer, recipient []byte, report func(macstore.Progress)) (string, macstore.Progress, error)
}

// through calls do with the key service of the configuration if that runs, and else
// with its storage.
func (f *backendFlags) through(ctx context.Context, do func(records) error) error {
	if f.kms == "" && f.storage == "" && len(f.old) == 0 && f.recordKey == "" {
		path := f.config
		if path == "" {
			path = serveConfig
		}
		cfg, err := keyservice.LoadConfig(path, keyservice.Config{})
		if err != nil {
			return err
		}
		if cfg.Admin != "" {
			c := keyservice.NewAdminClient(cfg.Admin)
			if c.Running(ctx) {
				return errors.Join(do(c), c.Close())
			}
		}
	}
	return f.with(ctx, nil, func(a *keyservice.Admin) error { return do(a) })
}

// with opens the records and calls do. An empty storage is refused unless fresh is
// set, which is told the ID of the MAC key that is made for it.
func (f *backendFlags) with(ctx context.Context, fresh func(id string) error, do func(*keyservice.Admin) error) (err error) {
	if err := refuseSecrets(append([]string{f.kms, f.storage}, f.old...)...); err != nil {
		return err
	}
	if f.config == "" && f.kms == "" && f.storage == "" {
		f.config = serveConfig
	}
	if f.config != "" {
		cfg, err := keyservice.LoadConfig(f.config, keyservice.Config{KMS: f.kms, Storage: f.storage})
		if err != nil {
			return err
		}
		f.kms, f.storage = cfg.KMS, cfg.Storage
		if len(f.old) == 0 {
			f.old = cfg.OldKMS
		}
		if f.recordKey == "" {
			f.recordKey = cfg.RecordKey
		}
	}
	if f.kms == "" || f.storage == "" {
		return failure.Newf(failure.Usage, "--kms URI and --storage URI, or --config FILE", "a key management backend and a storage must be named")
	}
	var all []kms.KMS
	for _, uri := range append([]string{f.kms}, f.old...) {
		k, err := setup.KMS(ctx, uri)
		if err != nil {
			return keyservice.BackendError(fmt.Errorf("%s: %w", setup.Redact(uri), err))
		}
		defer k.Close()
		all = append(all, k)
	}
	s, err := setup.StorageOfService(ctx, f.storage)
	if err != nil {
		return keyservice.BackendError(fmt.Errorf("%s: %w", setup.Redact(f.storage), err))
	}
	defer s.Close()
	k := kms.WithOld(all[0], all[1:]...)
	var admin *keyservice.Admin
	if fresh == nil {
		admin, err = keyservice.OpenAdmin(ctx, k, s, f.recordKey)
	} else {
		admin, err = keyservice.OpenNewAdmin(ctx, k, s, f.recordKey, fresh)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, admin.Close()) }()
	return do(admin)
}

// refuseSecrets refuses URIs that hold a secret: other processes can read the
// arguments and the environment of this one.
func refuseSecrets(uris ...string) error {
	for _, uri := range uris {
		if name, instead := setup.HoldsSecret(uri); name != "" {
			return failure.Newf(failure.Usage, fmt.Sprintf("put the secret into a file and name it with the parameter %q, or put the URI into a configuration file that only its owner can read", instead),
				"%s: the parameter %q is a secret, and others can read what stands on a command line or in the environment", setup.Redact(uri), name)
		}
	}
	return nil
}

func newKMSStatus() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "status",
		Short: "Say which records there are, and under which KEKs their keys are",
		Long: `Say which records there are, and under which KEKs their keys are.

Every record is read and its MAC checked; no key is unwrapped. The exit code is 14
if a record is refused.`,
		Example: `  keyagent kms status --config /etc/keyagent/serve.yaml
  keyagent kms status --kms 'kms://aws?keyName=alias/disks' --storage 'storage://aws?bucket=records' --output json`,
		Args: cobra.NoArgs,
	}
	var f backendFlags
	f.add(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.through(cmd.Context(), func(a records) error {
			s, err := a.Status(cmd.Context())
			if err != nil {
				return err
			}
			if err := print(cmd, *output, s, func(w io.Writer) { printStatus(w, s) }); err != nil {
				return err
			}
			if len(s.Refused) > 0 {
				return failure.Newf(failure.Tampered, "they were changed, or created under another record MAC key", "records are refused")
			}
			return nil
		})
	}
	return cmd
}

func printStatus(w io.Writer, s *keyservice.Status) {
	outdated := func(kek string) string {
		if kek == s.Current {
			return ""
		}
		return "  (outdated)"
	}
	fmt.Fprintf(w, "KEK in force    %s\nrecord MAC key  %s, under %s%s\n", s.Current, s.RecordKey, s.MACKey, outdated(s.MACKey))
	for _, state := range slices.Sorted(maps.Keys(s.Volumes)) {
		fmt.Fprintf(w, "%-15s %d volumes\n", state, s.Volumes[state])
	}
	fmt.Fprintf(w, "%-15s %d\n", "other DEKs", s.DEKs)
	for _, kek := range slices.Sorted(maps.Keys(s.Keys)) {
		fmt.Fprintf(w, "%-15s %d under %s%s\n", "keys", s.Keys[kek], kek, outdated(kek))
	}
	fmt.Fprintf(w, "%-15s %d", "outdated", s.Outdated)
	if s.Outdated > 0 {
		fmt.Fprint(w, "  (hint: keyagent kms rewrap)")
	}
	fmt.Fprintln(w)
	for _, r := range s.Refused {
		fmt.Fprintf(w, "%-15s %s\n", "REFUSED", r)
	}
}

func newKMSRewrap() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Wrap every key again under the KEK in force",
		Long: `Wrap every key again under the KEK in force.

Keys that are under it already are left alone, so that this may be killed at any
point and run again. The DEKs stay the same: no disk changes. It works beside key
services that run; they must be able to open keys under both KEKs meanwhile, see
old_kms in docs/configuration.md.`,
		Example: `  keyagent kms rewrap --config /etc/keyagent/serve.yaml
  keyagent kms rewrap --kms 'kms://cluster-kms?file=new' --old-kms 'kms://cluster-kms?file=old' --storage storage://file?dir=records`,
		Args: cobra.NoArgs,
	}
	var f backendFlags
	f.add(cmd)
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		return f.through(cmd.Context(), func(a records) error {
			p, err := a.Rewrap(cmd.Context(), progress(cmd.ErrOrStderr(), "looked at"))
			if err != nil {
				return fmt.Errorf("after %d of %d records, and run again it goes on where it was: %w", p.Done, p.Total, err)
			}
			return print(cmd, *output, p, func(w io.Writer) {
				fmt.Fprintf(w, "%d records, %d of them wrapped again\n", p.Total, p.Changed)
			})
		})
	}
	return cmd
}

// progress says how far a walk is, at most once a second.
func progress(w io.Writer, verb string) func(macstore.Progress) {
	last := time.Now()
	return func(p macstore.Progress) {
		if now := time.Now(); now.Sub(last) >= time.Second {
			last = now
			fmt.Fprintf(w, "%s %d of %d records\n", verb, p.Done, p.Total)
		}
	}
}

func newKMSRecipient() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "recipient",
		Short: "Make an identity for an import, and print whom to export to",
		Long: `Make an identity for an import, and print whom to export to.

The identity stays on this machine: it opens every key of the export. Delete it
when the import is done. The digest belongs with the recipient, by another way: who
exchanges the recipient gets every key.`,
		Example: `  keyagent kms recipient --identity transfer.key >transfer.pub`,
		Args:    cobra.NoArgs,
	}
	path := cmd.Flags().String("identity", "", "file to make; it must not exist")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *path == "" {
			return failure.Newf(failure.Usage, "--identity FILE", "the identity's file must be named")
		}
		identity, recipient, err := keyservice.NewTransferIdentity()
		if err != nil {
			return err
		}
		defer identity.Close()
		if err := config.WriteSecretFile(*path, identity); err != nil {
			return failure.New(failure.Configuration, fmt.Errorf("identity: %w", err), "")
		}
		cmd.Println(base64.StdEncoding.EncodeToString(recipient))
		cmd.PrintErrf("recipient digest %s\n", keyservice.RecipientDigest(recipient))
		return nil
	}
	return cmd
}

func newKMSExport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export",
		Short: "Write all records with their keys, sealed to the identity of an import",
		Long: `Write all records with their keys, sealed to the identity of an import.

The printed digest belongs with the file, by another way than the file: it is how
the import knows that the file is this one.`,
		Example: `  keyagent kms export --recipient transfer.pub --recipient-digest 0a31… --file records.export`,
		Args:    cobra.NoArgs,
	}
	var f backendFlags
	f.add(cmd)
	recipientFile := cmd.Flags().String("recipient", "", "file that keyagent kms recipient printed")
	recipientDigest := cmd.Flags().String("recipient-digest", "", "what keyagent kms recipient printed beside it")
	file := cmd.Flags().String("file", "", "file to write; it must not exist")
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		if *recipientFile == "" || *recipientDigest == "" || *file == "" {
			return failure.Newf(failure.Usage, "--recipient FILE --recipient-digest HEX --file FILE", "the recipient with its digest, and the file to write, must be given")
		}
		text, err := config.ReadPublicFile(*recipientFile, 8<<10)
		if err != nil {
			return failure.New(failure.Configuration, fmt.Errorf("recipient: %w", err), "")
		}
		recipient, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(text)))
		if err != nil {
			return failure.Newf(failure.Configuration, "keyagent kms recipient prints one", "recipient: the file holds none")
		}
		if got := keyservice.RecipientDigest(recipient); !strings.EqualFold(got, *recipientDigest) {
			return failure.Newf(failure.Tampered, "ask the other side for the digest again", "recipient: it has the digest %s, which is not the one that was given", got)
		}
		return f.through(cmd.Context(), func(a records) error {
			out, err := os.OpenFile(*file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			if err != nil {
				hint := ""
				if errors.Is(err, fs.ErrExist) {
					hint = "nothing is overwritten: name another file"
				}
				return failure.New(failure.Configuration, err, hint)
			}
			digest, p, err := a.Export(cmd.Context(), out, recipient, progress(cmd.ErrOrStderr(), "exported"))
			if written := errors.Join(out.Sync(), out.Close()); digest == "" || written != nil {
				// A part of an export cannot be imported.
				return failure.New(failure.Internal, errors.Join(err, written, os.Remove(*file)), "")
			}
			cmd.Printf("%d records\ndigest %s\n", p.Done-p.Failed, digest)
			if err != nil {
				return fmt.Errorf("%d objects were left out, which are no records: %w", p.Refused, err)
			}
			return nil
		})
	}
	return cmd
}

func newKMSImport() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "import FILE",
		Short: "Make the records of an export here, under this side's KEK",
		Long: `Make the records of an export here, under this side's KEK.

The whole file is verified before anything is written. Records that are here with
the same keys are left alone, so that this may be killed at any point and run
again; one that differs is an error, and is not overwritten.`,
		Example: `  keyagent kms import --identity transfer.key --digest 5f70… records.export`,
		Args:    cobra.ExactArgs(1),
	}
	var f backendFlags
	f.add(cmd)
	identityFile := cmd.Flags().String("identity", "", "file that keyagent kms recipient made")
	digest := cmd.Flags().String("digest", "", "what keyagent kms export printed")
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if *identityFile == "" || *digest == "" {
			return failure.Newf(failure.Usage, "--identity FILE --digest HEX", "the identity and the digest of the export must be given")
		}
		identity, err := config.ReadSecretFile(*identityFile, 4<<10)
		if err != nil {
			return failure.New(failure.Configuration, fmt.Errorf("identity: %w", err), "")
		}
		defer identity.Close()
		in, err := os.Open(args[0])
		if err != nil {
			class := failure.Configuration
			if errors.Is(err, fs.ErrNotExist) {
				class = failure.NotFound
			}
			return failure.New(class, err, "")
		}
		defer in.Close()
		// Before anything is made on this side, its first MAC key among it.
		export, err := keyservice.OpenExport(in, identity, *digest)
		if err != nil {
			return err
		}
		defer export.Close()
		announce := func(id string) error {
			cmd.PrintErrf("making the record MAC key %s (hint: --record-key %s, if this is run again)\n", id, id)
			return nil
		}
		return f.with(cmd.Context(), announce, func(a *keyservice.Admin) error {
			done, err := a.Import(cmd.Context(), export)
			if err != nil {
				return fmt.Errorf("after %d records: %w", done.Created+done.Present, err)
			}
			return print(cmd, *output, done, func(w io.Writer) {
				fmt.Fprintf(w, "%d records made, %d were there\n", done.Created, done.Present)
			})
		})
	}
	return cmd
}
