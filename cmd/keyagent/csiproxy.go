package main

import (
	"errors"

	"github.com/spf13/cobra"

	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/csiproxy"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/systemd"
)

const defaultCSIConfig = "/etc/keyagent/csi.yaml"

func newCSIProxy() *cobra.Command {
	var path string
	var check bool
	var logs logFlags
	cmd := &cobra.Command{
		Use:   "csi-proxy",
		Short: "Encrypt the volumes of a CSI driver",
		Long: `Encrypt the volumes of a CSI driver, which stays as it is.

The proxy is kubelet's driver on its own socket, and asks the real one for raw block
devices alone. The agent opens each as a volume of its own: with a key that the key
service releases to this machine, for one node at a time. Filesystems are made, checked
and mounted by the agent; block volumes are the mapping's device.

Every volume of the driver is encrypted, unless the configuration leaves out its class.
The sidecars of the driver's controller may call the same socket: a volume is then larger
by its header than what a claim asks for.

A call can be repeated at any time, and after a crash of any part: the proxy keeps
nothing that the kernel or the agent does not know.`,
		Example: `  keyagent csi-proxy --config /etc/keyagent/csi.yaml
  keyagent csi-proxy --check`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) (err error) {
			log, err := logs.logger(cmd.ErrOrStderr())
			if err != nil {
				return err
			}
			cfg, err := csiproxy.Load(path)
			if err != nil {
				return err
			}
			if check {
				cmd.Println("the configuration is valid")
				return nil
			}
			// No landlock: it forbids to mount.
			filtered, err := confine.Syscalls(confine.Volumes)
			if err != nil {
				return failure.New(failure.Internal, err, "")
			}
			agentConn, err := dial(cfg.Agent)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, agentConn.Close()) }()
			driver, err := csiproxy.Dial(cfg.Driver)
			if err != nil {
				return err
			}
			defer func() { err = errors.Join(err, driver.Close()) }()
			ctx := cmd.Context()
			p := csiproxy.New(ctx, csiproxy.Options{
				Config: cfg, Log: log, Mounts: csiproxy.Kernel{}, Agent: agentConn, Driver: driver,
			})
			log.Info("starting", "driver", cfg.Driver, "listen", cfg.Listen, "seccomp", filtered)
			if len(cfg.PlainClasses) > 0 {
				log.Warn("volumes of these classes are NOT encrypted", "plain_classes", cfg.PlainClasses)
			}
			return p.Serve(ctx, func() { systemd.NewNotifier().Ready("serving kubelet") })
		},
	}
	cmd.Flags().StringVar(&path, "config", defaultCSIConfig, "configuration file")
	cmd.Flags().BoolVar(&check, "check", false, "only check the configuration")
	logs.add(cmd)
	return cmd
}
