package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"slices"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyclient"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/offline"
)

// volumeVerb is a one-shot verb: it asks the running agent, or does the work
// itself where none runs.
type volumeVerb struct {
	config     string
	socket     string
	standalone bool
	needAgent  bool
	logs       logFlags
}

func (v *volumeVerb) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&v.config, "config", defaultAgentConfig, "the agent's configuration, for work without a running agent")
	cmd.Flags().StringVar(&v.socket, "socket", node.DefaultSocket, "the running agent's socket")
	cmd.Flags().BoolVar(&v.standalone, "standalone", false, "do not look for a running agent")
	cmd.Flags().BoolVar(&v.needAgent, "need-agent", false, "fail if no agent runs, which would renew leases")
	cmd.MarkFlagsMutuallyExclusive("standalone", "need-agent")
	v.logs.add(cmd)
}

// newCore wires the node's core.
func newCore(cfg *node.Config, keys agent.Keys, log *slog.Logger, progress keyclient.Progress) *agent.Volumes {
	options := coreOptions(cfg, keys, log, progress)
	// Not in the initrd, which has no folder that outlives a boot.
	options.Offline = offline.New(offline.Options{Device: cfg.TPM.Device, Dir: cfg.OfflineDir, RunDir: cfg.StateDir})
	return agent.NewVolumes(options)
}

func coreOptions(cfg *node.Config, keys agent.Keys, log *slog.Logger, progress keyclient.Progress) agent.Options {
	return agent.Options{
		Keys: keys, Log: log, StateDir: cfg.StateDir, DeviceWait: cfg.DeviceWait(),
		AppearWait: min(cfg.RetryPolicy().Budget, time.Minute), Progress: progress,
		Register: cfg.Register(log),
	}
}

// connect finds the agent. Only where none listens does the verb work alone.
func (v *volumeVerb) connect(cmd *cobra.Command) (volumes, func(), error) {
	if !v.standalone {
		socket := v.agentSocket(cmd)
		c, err := net.DialTimeout("unix", socket, 2*time.Second)
		if err == nil {
			_ = c.Close()
			return dialAgent(socket)
		}
		if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ECONNREFUSED) {
			return nil, nil, failure.New(failure.Unreachable, fmt.Errorf("agent: %w", err), "--standalone works without the agent")
		}
		if v.needAgent {
			return nil, nil, failure.New(failure.Unreachable, fmt.Errorf("agent: %w", err), "systemctl status keyagent-agent says why it does not run")
		}
	}
	return v.alone(cmd)
}

// alone does the work in this process.
func (v *volumeVerb) alone(cmd *cobra.Command) (*local, func(), error) {
	log, err := v.logs.logger(cmd.ErrOrStderr())
	if err != nil {
		return nil, nil, err
	}
	cfg, err := node.Load(v.config)
	if err != nil {
		return nil, nil, err
	}
	if err := cfg.Resolve(cmd.Context()); err != nil {
		return nil, nil, err
	}
	keys, closer, err := cfg.KeyClient(log, nil)
	if err != nil {
		return nil, nil, err
	}
	core := newCore(cfg, keys, log, nil)
	core.Recover(cmd.Context())
	for _, one := range cfg.Volumes {
		core.Know(one)
	}
	return &local{cfg, core}, func() { _ = closer.Close() }, nil
}

// agentSocket is the one that was named, else the configuration's. A caller who
// may not read the configuration finds the agent at the usual place.
func (v *volumeVerb) agentSocket(cmd *cobra.Command) string {
	if cmd.Flags().Changed("socket") {
		return v.socket
	}
	if cfg, err := node.Load(v.config); err == nil {
		return cfg.Socket
	}
	return v.socket
}

// do is one verb on one volume.
type do func(context.Context, volumes, string) (*nodev1.Volume, error)

// onOne is a verb on the one volume that is named.
func (v *volumeVerb) onOne(f do) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, ids []string) error {
		vs, done, err := v.connect(cmd)
		if err != nil {
			return err
		}
		defer done()
		one, err := f(cmd.Context(), vs, ids[0])
		if err != nil {
			return err
		}
		report(cmd, ids[0], one)
		return nil
	}
}

// report says what became of a volume, and what an administrator has to look at.
func report(cmd *cobra.Command, id string, v *nodev1.Volume) {
	cmd.Printf("%s is %s\n", id, describe(v))
	for _, w := range v.GetWarnings() {
		cmd.PrintErrf("warning: %s: %s\n", id, w)
	}
}

// described are the flags that describe a volume that no configuration names.
type described struct{ req nodev1.OpenRequest }

func (d *described) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&d.req.Device, "device", "", "of a volume that is not configured: path, UUID=, PARTUUID=, LABEL= or PARTLABEL=")
	f.StringVar(&d.req.Name, "name", "", "of the mapping; default the volume's ID")
	f.StringVar(&d.req.Filesystem, "filesystem", "", "ext4, xfs, btrfs or none")
	f.StringVar(&d.req.MountPoint, "mount", "", "mount point")
	f.StringSliceVar(&d.req.Options, "options", nil, "mount options, separated by commas")
	f.BoolVar(&d.req.ReadOnly, "read-only", false, "map and mount it read-only")
	f.BoolVar(&d.req.Discards, "discards", false, "pass TRIM on to the disk")
	f.StringVar(&d.req.Integrity, "integrity", "", "hmac-sha256 or aegis128: authenticate what is on it")
	f.StringVar(&d.req.Source, "source", "", "the volume of which the device is a clone, if this one does not exist")
}

// check refuses flags that would be passed over.
func (d *described) check(cmd *cobra.Command, ids []string) error {
	if d.req.GetDevice() != "" {
		if len(ids) != 1 {
			return failure.Newf(failure.Usage, "name one volume beside --device", "--device describes one volume")
		}
		return nil
	}
	for _, name := range []string{"name", "filesystem", "mount", "options", "read-only", "discards", "integrity", "source"} {
		if cmd.Flags().Changed(name) {
			return failure.Newf(failure.Usage, "add --device, or change the configuration", "--%s describes a volume that is not configured", name)
		}
	}
	return nil
}

// request is what opens one volume.
func (d *described) request(id string, format bool) *nodev1.OpenRequest {
	return &nodev1.OpenRequest{Id: id, Format: format, Device: d.req.GetDevice(), Name: d.req.GetName(), Filesystem: d.req.GetFilesystem(),
		MountPoint: d.req.GetMountPoint(), Options: d.req.GetOptions(), ReadOnly: d.req.GetReadOnly(), Discards: d.req.GetDiscards(), Integrity: d.req.GetIntegrity(), Source: d.req.GetSource()}
}

func newUnlock() *cobra.Command {
	v, d := &volumeVerb{}, &described{}
	cmd := &cobra.Command{
		Use:   "unlock [VOLUME...]",
		Short: "Open volumes, all configured ones if none is named",
		Example: `  keyagent unlock
  keyagent unlock data
  keyagent unlock --standalone --config /etc/keyagent/agent.yaml   # in the initrd
  keyagent unlock backup --device /dev/sdc --filesystem xfs --mount /backup --read-only`,
		RunE: func(cmd *cobra.Command, ids []string) error {
			if err := d.check(cmd, ids); err != nil {
				return err
			}
			vs, done, err := v.connect(cmd)
			if err != nil {
				return err
			}
			defer done()
			if len(ids) == 0 {
				return unlockAll(cmd, vs)
			}
			var first error
			for _, id := range ids {
				// One volume that stays shut does not keep the others shut.
				first = said(cmd, first, id, false, openOne(cmd, vs, d.request(id, false)))
			}
			return first
		},
	}
	v.flags(cmd)
	d.flags(cmd)
	return cmd
}

// unlockAll opens what is configured, parents of mount points first.
func unlockAll(cmd *cobra.Command, vs volumes) error {
	outcomes, err := vs.openAll(cmd.Context())
	if err != nil {
		return err
	}
	// The cause is worth more than what it blocks.
	slices.SortStableFunc(outcomes, func(a, b opened) int {
		blocked := func(o opened) int {
			if errors.Is(o.err, agent.ErrBlocked) {
				return 1
			}
			return 0
		}
		return blocked(a) - blocked(b)
	})
	var first error
	for _, o := range outcomes {
		if o.err == nil {
			report(cmd, o.id, o.volume)
		}
		first = said(cmd, first, o.id, o.optional, o.err)
	}
	return first
}

func openOne(cmd *cobra.Command, vs volumes, r *nodev1.OpenRequest) error {
	one, err := vs.open(cmd.Context(), r)
	if err == nil {
		report(cmd, r.GetId(), one)
	}
	return err
}

// said reports the error of one volume of several, and returns the one that the
// command ends with.
func said(cmd *cobra.Command, first error, id string, optional bool, err error) error {
	switch {
	case err == nil:
	case optional:
		cmd.PrintErrf("%s is optional and stays closed: %v\n", id, err)
	case first == nil:
		return err
	default:
		cmd.PrintErrf("%s stays closed: %v\n", id, err)
	}
	return first
}

func newFormat() *cobra.Command {
	v, d := &volumeVerb{}, &described{}
	cmd := &cobra.Command{
		Use:   "format VOLUME",
		Short: "Create a volume on a blank disk, once, and open it",
		Long: `Create a volume on a blank disk, once, and open it.

The key service's record decides whether the volume may be created, and which
node creates it; the disk must be blank. A volume that exists is opened and never
formatted again. What was interrupted goes on where it stopped.`,
		Example: "  keyagent format data",
		Args:    cobra.ExactArgs(1),
	}
	one := v.onOne(func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) {
		return vs.open(ctx, d.request(id, true))
	})
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if err := d.check(cmd, ids); err != nil {
			return err
		}
		return one(cmd, ids)
	}
	v.flags(cmd)
	d.flags(cmd)
	return cmd
}

func newProvision() *cobra.Command {
	v, from := &volumeVerb{}, &node.Image{}
	cmd := &cobra.Command{
		Use:   "provision VOLUME",
		Short: "Create a volume from an image, once, and open it",
		Long: `Create a configured volume on a blank disk, once, as a copy of an image, and open it.

The image is a file or a block device. Either its SHA-256 is given, which is compared
before the volume may be used; or it is a dm-verity mapping with the given root hash,
whose blocks the kernel checks as they are read. An ext4 or XFS in it then grows to the
volume's size. Without --from the volume's from in the configuration is the image.

As keyagent format it never writes over a volume that exists, and goes on where it was
interrupted. It works without the agent, which renews the volume's lease afterwards.`,
		Example: `  keyagent provision root --from /dev/mapper/image --root-hash 4f1c…
  keyagent provision data --from /srv/data.img --sha256 9b2e…`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, ids []string) error {
			vs, done, err := v.alone(cmd)
			if err != nil {
				return err
			}
			defer done()
			one, err := vs.provision(cmd.Context(), ids[0], from)
			if err != nil {
				return err
			}
			report(cmd, ids[0], one)
			// A running agent finds the volume by this, and renews its lease.
			if agent, leave, err := dialAgent(v.agentSocket(cmd)); err == nil {
				defer leave()
				_, _ = agent.status(cmd.Context(), ids[0])
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&v.config, "config", defaultAgentConfig, "the agent's configuration")
	cmd.Flags().StringVar(&from.Path, "from", "", "path of the image; default the configuration's from")
	cmd.Flags().StringVar(&from.SHA256, "sha256", "", "of all of the image, 64 hex digits")
	cmd.Flags().StringVar(&from.RootHash, "root-hash", "", "of the dm-verity mapping that the image is")
	v.logs.add(cmd)
	return cmd
}

func newClose() *cobra.Command {
	v := &volumeVerb{}
	var all, giveBack bool
	cmd := &cobra.Command{
		Use:   "close VOLUME | --all",
		Short: "Unmount and close a volume",
		Long: `Unmount and close a volume, also one that is not configured any more.

If something uses it, everything stays as it was, and the message names who.

A volume whose key is kept for an outage of the key service keeps its lease as well, so
that no other machine writes it meanwhile. With --give-back that key is destroyed and the
lease goes back; it works on a closed volume, too.`,
		Example: `  keyagent close data
  keyagent close --give-back data   # for another machine to open it
  keyagent close --all`,
		Args: cobra.MaximumNArgs(1),
	}
	one := v.onOne(func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) {
		return vs.close(ctx, id, giveBack)
	})
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if all == (len(ids) == 1) {
			return failure.Newf(failure.Usage, "keyagent close VOLUME, or keyagent close --all", "name one volume, or --all")
		}
		if !all {
			return one(cmd, ids)
		}
		vs, done, err := v.connect(cmd)
		if err != nil {
			return err
		}
		defer done()
		return vs.closeAll(cmd.Context())
	}
	cmd.Flags().BoolVar(&all, "all", false, "close every volume, those mounted inside others first")
	cmd.Flags().BoolVar(&giveBack, "give-back", false, "also destroy the key that is kept for an outage, and give the lease back")
	cmd.MarkFlagsMutuallyExclusive("all", "give-back")
	v.flags(cmd)
	return cmd
}

// simple is a verb on one volume that needs no flags of its own.
func simple(use, short, long, example string, f do) *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{Use: use, Short: short, Long: long, Example: example, Args: cobra.ExactArgs(1), RunE: v.onOne(f)}
	v.flags(cmd)
	return cmd
}

func newResize() *cobra.Command {
	return simple("resize VOLUME", "Grow an open volume and its filesystem to the size of its disk",
		`Grow an open volume and its filesystem to the size of its disk, while it is in use.

The key service is asked for the key again. A volume never shrinks.`, "  keyagent resize data",
		func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) { return vs.resize(ctx, id) })
}

func newRotate() *cobra.Command {
	return simple("rotate VOLUME", "Give an open volume another key",
		`Give an open volume another key, while it is in use. The data stay as they are.

The old key opens nothing afterwards, and neither does a backup of the header from
before: make a new one. What was cut off is finished by running this again, and by the
agent itself. The grant on the key service must allow the operation rotate, unless an
operator asked for the change there: keyagent kms rotate.`, "  keyagent rotate data",
		func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) { return vs.rotate(ctx, id) })
}

func newRetire() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use: "retire VOLUME", Short: "End the life of a volume, and erase its header",
		Long: `End the life of a closed volume, and erase its header from the disk.

The key service destroys the volume's key first, and releases it to nobody any more; then
the header goes. What the volume holds is lost. A volume that another node writes by a lease is
refused; where the grant says many or readers, nobody is asked. The grant on the key service must allow
the operation retire. If it is cut off, run it again.`,
		Example: "  keyagent retire data --destroy-the-key", Args: cobra.ExactArgs(1),
	}
	said := cmd.Flags().Bool("destroy-the-key", false, "nobody needs what the volume holds")
	retire := v.onOne(func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) { return vs.retire(ctx, id) })
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		if !*said {
			return failure.Newf(failure.Usage, "--destroy-the-key says that nobody needs what the volume holds", "this cannot be taken back, and needs a word")
		}
		return retire(cmd, ids)
	}
	v.flags(cmd)
	return cmd
}

func newSuspend() *cobra.Command {
	return simple("suspend VOLUME", "Stop all I/O of an open volume and take its key from the kernel",
		`Stop all I/O of an open volume and take its key from the kernel.

What uses the volume waits until keyagent resume. Do not suspend the volume that
the system itself runs from: keyagent would wait with it.`, "  keyagent suspend data",
		func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) { return vs.suspend(ctx, id) })
}

func newResume() *cobra.Command {
	return simple("resume VOLUME", "Fetch the key of a suspended volume and let its I/O go on",
		`Fetch the key of a suspended volume and let its I/O go on.

The key service decides again whether this machine may have the key.`, "  keyagent resume data",
		func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) { return vs.resume(ctx, id) })
}

func newStatus() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:   "status [VOLUME]",
		Short: "Show volumes",
		Example: `  keyagent status
  keyagent status data --output json`,
		Args: cobra.MaximumNArgs(1),
	}
	output := outputFlag(cmd)
	cmd.RunE = func(cmd *cobra.Command, ids []string) error {
		vs, done, err := v.connect(cmd)
		if err != nil {
			return err
		}
		defer done()
		var all []*nodev1.Volume
		if len(ids) == 1 {
			one, err := vs.status(cmd.Context(), ids[0])
			if err != nil {
				return err
			}
			all = append(all, one)
		} else if all, err = vs.list(cmd.Context()); err != nil {
			return err
		}
		return print(cmd, *output, all, func(w io.Writer) { table(w, all) })
	}
	v.flags(cmd)
	return cmd
}

func table(w io.Writer, all []*nodev1.Volume) {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "VOLUME\tSTATE\tDEVICE\tMAPPED\tMOUNT\tLEASE\tGENERATION")
	for _, v := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\n", v.GetId(), v.GetState(), v.GetDevice(), dash(v.GetMapped()), dash(v.GetMountPoint()), dash(v.GetLease()), v.GetGeneration())
	}
	_ = t.Flush()
	for _, v := range all {
		if v.GetProgress() != "" {
			fmt.Fprintf(w, "%s: %s\n", v.GetId(), v.GetProgress())
		}
		if v.GetLastError() != "" {
			fmt.Fprintf(w, "%s: %s\n", v.GetId(), v.GetLastError())
		}
		for _, warning := range v.GetWarnings() {
			fmt.Fprintf(w, "%s: warning: %s\n", v.GetId(), warning)
		}
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func describe(v *nodev1.Volume) string {
	switch agent.State(v.GetState()) {
	case agent.Mounted:
		if v.GetMountPoint() == "" {
			return "in use as " + v.GetMapped()
		}
		return "open and mounted on " + v.GetMountPoint()
	case agent.Open:
		return "open as " + v.GetMapped()
	case agent.Absent:
		return "closed"
	}
	return v.GetState()
}
