package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"

	nodev1 "github.com/keyagent/keyagent/api/keyagent/node/v1"
	"github.com/keyagent/keyagent/internal/agent"
	"github.com/keyagent/keyagent/internal/failure"
)

// volumeVerb is a one-shot verb: it asks the running agent, or does the work
// itself where none runs.
type volumeVerb struct {
	config     string
	socket     string
	standalone bool
	logs       logFlags
}

func (v *volumeVerb) flags(cmd *cobra.Command) {
	cmd.Flags().StringVar(&v.config, "config", defaultAgentConfig, "the agent's configuration, for work without a running agent")
	cmd.Flags().StringVar(&v.socket, "socket", agent.DefaultSocket, "the running agent's socket")
	cmd.Flags().BoolVar(&v.standalone, "standalone", false, "do not look for a running agent")
	v.logs.add(cmd)
}

// volumes is what both the agent and the manager can do.
type volumes interface {
	open(ctx context.Context, id string, format bool) (*nodev1.Volume, error)
	close(ctx context.Context, id string) (*nodev1.Volume, error)
	status(ctx context.Context, id string) (*nodev1.Volume, error)
	list(ctx context.Context) ([]*nodev1.Volume, error)
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
	}
	log, err := v.logs.logger(cmd.ErrOrStderr())
	if err != nil {
		return nil, nil, err
	}
	cfg, err := agent.LoadConfig(v.config)
	if err != nil {
		return nil, nil, err
	}
	m, closer, err := newManager(cfg, log, nil)
	if err != nil {
		return nil, nil, err
	}
	return local{m}, func() { _ = closer.Close() }, nil
}

// onOne is a verb on the one volume that is named.
func (v *volumeVerb) onOne(do func(context.Context, volumes, string) (*nodev1.Volume, error)) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, ids []string) error {
		vs, done, err := v.connect(cmd)
		if err != nil {
			return err
		}
		defer done()
		one, err := do(cmd.Context(), vs, ids[0])
		if err != nil {
			return err
		}
		cmd.Printf("%s is %s\n", ids[0], describe(one))
		return nil
	}
}

// agentSocket is the one that was named, else the configuration's. A caller who
// may not read the configuration finds the agent at the usual place.
func (v *volumeVerb) agentSocket(cmd *cobra.Command) string {
	if cmd.Flags().Changed("socket") {
		return v.socket
	}
	if cfg, err := agent.LoadConfig(v.config); err == nil {
		return cfg.Socket
	}
	return v.socket
}

func newUnlock() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:   "unlock [VOLUME...]",
		Short: "Open volumes, all configured ones if none is named",
		Example: `  keyagent unlock
  keyagent unlock data
  keyagent unlock --standalone --config /etc/keyagent/agent.yaml   # in the initrd`,
		RunE: func(cmd *cobra.Command, ids []string) error {
			vs, done, err := v.connect(cmd)
			if err != nil {
				return err
			}
			defer done()
			optional := map[string]bool{}
			if len(ids) == 0 {
				all, err := vs.list(cmd.Context())
				if err != nil {
					return err
				}
				for _, one := range all {
					ids = append(ids, one.GetId())
					optional[one.GetId()] = one.GetOptional()
				}
			}
			// One volume that stays shut does not keep the others shut.
			var first error
			for _, id := range ids {
				one, err := vs.open(cmd.Context(), id, false)
				switch {
				case err == nil:
					cmd.Printf("%s is %s\n", id, describe(one))
				case optional[id]:
					cmd.PrintErrf("%s is optional and stays closed: %v\n", id, err)
				case first == nil:
					first = err
				default:
					cmd.PrintErrf("%s stays closed: %v\n", id, err)
				}
			}
			return first
		},
	}
	v.flags(cmd)
	return cmd
}

func newFormat() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:   "format VOLUME",
		Short: "Create a volume on a blank disk, once, and open it",
		Long: `Create a volume on a blank disk, once, and open it.

The key service's record decides whether the volume may be created; the disk
must be blank. A volume that exists is opened and never formatted again. What
was interrupted goes on where it stopped.`,
		Example: "  keyagent format data",
		Args:    cobra.ExactArgs(1),
		RunE: v.onOne(func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) {
			return vs.open(ctx, id, true)
		}),
	}
	v.flags(cmd)
	return cmd
}

func newClose() *cobra.Command {
	v := &volumeVerb{}
	cmd := &cobra.Command{
		Use:     "close VOLUME",
		Short:   "Unmount and close a volume",
		Example: "  keyagent close data",
		Args:    cobra.ExactArgs(1),
		RunE: v.onOne(func(ctx context.Context, vs volumes, id string) (*nodev1.Volume, error) {
			return vs.close(ctx, id)
		}),
	}
	v.flags(cmd)
	return cmd
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
	fmt.Fprintln(t, "VOLUME\tSTATE\tDEVICE\tMAPPED\tMOUNT\tGENERATION")
	for _, v := range all {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%d\n", v.GetId(), v.GetState(), v.GetDevice(), dash(v.GetMapped()), dash(v.GetMountPoint()), v.GetGeneration())
	}
	_ = t.Flush()
	for _, v := range all {
		if v.GetLastError() != "" {
			fmt.Fprintf(w, "%s: %s\n", v.GetId(), v.GetLastError())
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
	switch v.GetState() {
	case agent.StateMounted:
		return "open and mounted on " + v.GetMountPoint()
	case agent.StateOpen:
		return "open as " + v.GetMapped()
	}
	return v.GetState()
}

// local works without an agent.
type local struct{ m *agent.Manager }

func (l local) open(ctx context.Context, id string, format bool) (*nodev1.Volume, error) {
	v, err := l.m.Open(ctx, id, format)
	return agent.Message(v), err
}

func (l local) close(ctx context.Context, id string) (*nodev1.Volume, error) {
	v, err := l.m.Close(ctx, id)
	return agent.Message(v), err
}

func (l local) status(ctx context.Context, id string) (*nodev1.Volume, error) {
	v, err := l.m.Status(ctx, id)
	return agent.Message(v), err
}

func (l local) list(ctx context.Context) ([]*nodev1.Volume, error) {
	var out []*nodev1.Volume
	for _, v := range l.m.List(ctx) {
		out = append(out, agent.Message(v))
	}
	return out, nil
}

// remote asks a running agent.
type remote struct{ c nodev1.NodeClient }

func dialAgent(socket string) (volumes, func(), error) {
	conn, err := grpc.NewClient("unix:"+socket, grpc.WithTransportCredentials(agent.LocalCredentials()), grpc.WithNoProxy())
	if err != nil {
		return nil, nil, err
	}
	return remote{nodev1.NewNodeClient(conn)}, func() { _ = conn.Close() }, nil
}

func (r remote) open(ctx context.Context, id string, format bool) (*nodev1.Volume, error) {
	resp, err := r.c.Open(ctx, &nodev1.OpenRequest{Id: id, Format: format})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) close(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Close(ctx, &nodev1.CloseRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) status(ctx context.Context, id string) (*nodev1.Volume, error) {
	resp, err := r.c.Status(ctx, &nodev1.StatusRequest{Id: id})
	return resp.GetVolume(), fromAgent(err)
}

func (r remote) list(ctx context.Context) ([]*nodev1.Volume, error) {
	resp, err := r.c.List(ctx, &nodev1.ListRequest{})
	return resp.GetVolumes(), fromAgent(err)
}

func fromAgent(err error) error {
	if err == nil {
		return nil
	}
	return failure.FromStatus(err)
}
