//go:build !keyagent_node

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/keyagent/keyagent/internal/confine"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/keyservice"
	"github.com/keyagent/keyagent/internal/kubekms"
	"github.com/keyagent/keyagent/internal/localweb"
	"github.com/keyagent/keyagent/internal/node"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/unixsocket"
	"github.com/keyagent/keyagent/kms/command"
	"github.com/keyagent/keyagent/kms/setup"
	"github.com/keyagent/keyagent/systemd"
)

// kubekmsFlags are those of keyagent kubekms itself.
type kubekmsFlags struct {
	source   kekSourceFlags
	refresh  kubekms.Options
	mode     string
	outage   string
	endpoint string
	socket   struct{ mode, owner string }
	uids     []uint
	metrics  string
	logs     logFlags
}

func newKubeKMS() *cobra.Command {
	var f kubekmsFlags
	cmd := &cobra.Command{
		Use:   "kubekms",
		Short: "Be the KMS plugin of kube-apiserver",
		Long: `Be the KMS plugin of kube-apiserver: encrypt the keys of etcd's objects.

The key-encryption key (KEK) comes from one of three sources: a command prints it
(--command); it is a local one that a key management service wraps (--kms); or the
key service releases it to this machine, on the strength of its evidence
(--agent-config). It must be there at the start. It is fetched again each fifth of
--timeout; after five failures in a row it is wiped, and requests fail until the
source answers.

A KEK that changes encrypts only after --observations fetches in a row gave it. The
one before still decrypts for --keep-old, and for as long as --old-command or the
wrapped file gives it.

Both protocols, v2 and v1beta1, are on one socket: that of --endpoint, or the one
that systemd hands over. Ciphertexts of the daemon of 2018 are read always.`,
		Example: `  keyagent kubekms --command 'cat /run/credentials/kek' --endpoint unix:///run/keyagent/kms.sock
  keyagent kubekms --kms 'kms://aws?keyName=alias/etcd' --wrapped-kek /var/lib/keyagent/kek.json --init --endpoint unix:///run/keyagent/kms.sock
  keyagent kubekms --agent-config /etc/keyagent/agent.yaml --volume etcd-kek --outage coast --coast-for 30m
  keyagent kubekms doctor /etc/kubernetes/encryption.yaml`,
		Args: cobra.NoArgs,
	}
	cmd.RunE = func(cmd *cobra.Command, _ []string) error { return f.run(cmd) }
	fl := cmd.Flags()
	f.source.add(cmd)
	fl.StringVar(&f.endpoint, "endpoint", "", "unix:///PATH, or unix:@NAME of an abstract socket (default: the socket that systemd hands over)")
	fl.DurationVar(&f.refresh.Timeout, "timeout", kubekms.DefaultTimeout, "how long a KEK is used without a refresh; at least "+kubekms.MinTimeout.String())
	fl.StringVar(&f.mode, "mode", string(kubekms.AESGCM), "format of new ciphertexts: aesgcm, or aescbc, which is that of 2018 and not authenticated")
	fl.IntVar(&f.refresh.Observations, "observations", kubekms.DefaultObservations, "fetches in a row that must give another KEK before it encrypts")
	fl.DurationVar(&f.refresh.KeepOld, "keep-old", kubekms.DefaultKeepOld, "how long to keep decrypting with a KEK the source no longer returns")
	fl.StringVar(&f.outage, "outage", string(kubekms.Fail), "after five failures in a row: fail, or coast, which goes on for --coast-for and says that it is not healthy")
	fl.DurationVar(&f.refresh.CoastFor, "coast-for", 0, "how long to coast; goes with --outage coast")
	fl.StringVar(&f.socket.mode, "socket-mode", "0600", "mode of the socket, in octal")
	fl.StringVar(&f.socket.owner, "socket-owner", "", "USER or USER:GROUP, by name or number, that the socket belongs to (default: this process's)")
	fl.UintSliceVar(&f.uids, "allow-uid", nil, "user that may call; may be repeated (default: root and this process's)")
	fl.StringVar(&f.metrics, "metrics", "", "loopback address of /metrics, /healthz and /readyz (default: none)")
	f.logs.add(cmd)
	cmd.AddCommand(newKubeKMSRotate(), newKubeKMSForget(), newKubeKMSDoctor(), newKubeKMSPlan())
	return cmd
}

func (f *kubekmsFlags) run(cmd *cobra.Command) (err error) {
	log, err := f.logs.logger(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	if f.refresh.Mode, err = kubekms.ParseMode(f.mode); err != nil {
		return err
	}
	f.refresh.Outage, f.refresh.Log, f.refresh.Metrics = kubekms.Outage(f.outage), log, kubekms.NewMetrics()
	if f.refresh, err = kubekms.Typed(f.refresh); err != nil {
		return err
	}
	owner, err := f.socketOptions()
	if err != nil {
		return err
	}
	uids, err := f.allowed()
	if err != nil {
		return err
	}
	if slices.Contains(uids, unixsocket.Overflow) {
		log.Warn("--allow-uid: " + unixsocket.OverflowAdvice)
	}
	if f.metrics != "" && !localweb.Local(f.metrics) {
		return failure.Newf(failure.Usage, "127.0.0.1:PORT", "the address of the metrics, %q, is not of the loopback interface", f.metrics)
	}
	if err := f.source.check(f.refresh.Timeout); err != nil {
		return err
	}
	// Before anything runs: a command that is started may not inherit the socket, nor
	// may one run, or a KEK be made, for an endpoint that is none.
	l, err := listenKubeKMS(f.endpoint, owner)
	if err != nil {
		return failure.New(failure.Configuration, err, "")
	}
	defer l.Close()
	work := confine.Keys
	if f.source.runsCommand() {
		work = confine.Commands
	}
	filtered, err := confine.Syscalls(work)
	if err != nil {
		return failure.New(failure.Internal, err, "")
	}
	ctx := cmd.Context()
	source, closer, err := f.source.open(ctx, f.refresh.Timeout, log)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, closer.Close()) }()
	refresher, err := kubekms.NewRefresher(ctx, source, f.refresh)
	if err != nil {
		return err
	}
	landlock, err := f.confineFiles(l)
	if err != nil {
		return err
	}
	log.Info("confined", "seccomp", filtered, "landlock", landlock)
	f.refresh.Metrics.Watch(refresher.Ring())
	// The KEKs stay until the last request is answered.
	keep, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return refresher.Run(keep) })
	group.Go(func() error {
		defer release()
		return f.serve(ctx, l, refresher.Ring(), uids)
	})
	if f.metrics != "" {
		group.Go(func() error {
			l, err := localweb.Listen(f.metrics, false)
			if err != nil {
				return err
			}
			return localweb.Serve(ctx, l, f.refresh.Metrics.Handler(refresher.Ring()))
		})
	}
	return group.Wait()
}

// confineFiles takes from this process all files but those of the plugin. What a command
// needs only the operator knows: where one runs, nothing is taken. By now everything is
// there that comes late, such as a TPM.
func (f *kubekmsFlags) confineFiles(l net.Listener) (version int, err error) {
	if f.source.runsCommand() {
		return 0, nil
	}
	p, err := f.source.files()
	if err != nil {
		return 0, err
	}
	if path := l.Addr().String(); strings.HasPrefix(path, "/") {
		p.Sockets = []string{path}
	}
	version, err = confine.Files(p)
	return version, failure.New(failure.Internal, err, "")
}

// serve answers on the socket until ctx ends.
func (f *kubekmsFlags) serve(ctx context.Context, l net.Listener, ring *kubekms.Ring, uids []uint32) error {
	log := f.refresh.Log
	server := kubekms.NewServer(kubekms.ServerOptions{Ring: ring, UIDs: uids, Version: semantic(version), Log: log, Metrics: f.refresh.Metrics})
	h := ring.Health()
	log.Info("serving", "socket", l.Addr().String(), "key_id", h.KeyID, "keys", h.Keys, "mode", f.mode, "uids", uids,
		"secrets", secret.InForce(), "erasing", secret.Erases)
	notify := systemd.NewNotifier()
	notify.Ready("serving on " + l.Addr().String())
	defer notify.Stopping()
	group, ctx := errgroup.WithContext(ctx)
	group.Go(func() error { return server.Run(ctx, l) })
	group.Go(func() error { return notify.Watch(ctx) })
	return group.Wait()
}

// allowed are the users that may call.
func (f *kubekmsFlags) allowed() ([]uint32, error) {
	if len(f.uids) == 0 {
		return slices.Compact([]uint32{0, uint32(os.Geteuid())}), nil
	}
	var out []uint32
	for _, uid := range f.uids {
		if uid > 1<<32-2 {
			return nil, failure.Newf(failure.Usage, "", "there is no user %d", uid)
		}
		out = append(out, uint32(uid))
	}
	return out, nil
}

func (f *kubekmsFlags) socketOptions() (o unixsocket.Options, err error) {
	mode, err := strconv.ParseUint(f.socket.mode, 8, 32)
	if err != nil || mode&^0o777 != 0 || mode == 0 {
		return o, failure.Newf(failure.Usage, "three octal digits, such as 0660", "%q is no mode of a socket", f.socket.mode)
	}
	o = unixsocket.Options{Mode: fs.FileMode(mode), UID: -1, GID: -1}
	if f.socket.owner == "" {
		return o, nil
	}
	name, group, hasGroup := strings.Cut(f.socket.owner, ":")
	if o.UID, err = lookUp(name, func(s string) (string, error) {
		u, err := user.Lookup(s)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	}); err != nil {
		return o, err
	}
	if hasGroup {
		o.GID, err = lookUp(group, func(s string) (string, error) {
			g, err := user.LookupGroup(s)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
	}
	return o, err
}

// lookUp returns the number of a user or group, which may be named by it.
func lookUp(name string, find func(string) (string, error)) (int, error) {
	n, err := strconv.ParseUint(name, 10, 31)
	if err == nil {
		return int(n), nil
	}
	number, err := find(name)
	if err != nil {
		return 0, failure.New(failure.Usage, fmt.Errorf("--socket-owner: %w", err), "")
	}
	return strconv.Atoi(number)
}

// listenKubeKMS understands what kube-apiserver does, and the names of gRPC.
func listenKubeKMS(endpoint string, opts unixsocket.Options) (*net.UnixListener, error) {
	if endpoint == "" {
		return unixsocket.Inherited()
	}
	path, ok := strings.CutPrefix(endpoint, "unix:")
	if rest, hasHost := strings.CutPrefix(path, "//"); hasHost {
		path = rest
	}
	// kube-apiserver writes an abstract name as unix:///@NAME.
	if name, abstract := strings.CutPrefix(strings.TrimPrefix(path, "/"), "@"); ok && abstract {
		return unixsocket.ListenAbstract(name)
	}
	if !ok || !strings.HasPrefix(path, "/") {
		return nil, failure.Newf(failure.Usage, "unix:///PATH or unix:@NAME", "%q is no endpoint", endpoint)
	}
	return unixsocket.Listen(path, opts)
}

// semantic makes a semantic version, which v1beta1 demands.
func semantic(v string) string {
	if v != "" && v[0] >= '0' && v[0] <= '9' && strings.Count(v, ".") >= 2 {
		return v
	}
	return "0.0.0+" + strings.Map(func(r rune) rune {
		if r < '0' || r > 'z' || r > '9' && r < 'A' || r > 'Z' && r < 'a' {
			return '-'
		}
		return r
	}, v)
}

// kekSourceFlags name a source of the KEK.
type kekSourceFlags struct {
	command  string
	old      []string
	encoding string
	deadline time.Duration
	wrapped  wrappedFlags
	init     bool
	agent    string
	volume   string
}

func (f *kekSourceFlags) add(cmd *cobra.Command) {
	fl := cmd.Flags()
	fl.StringVar(&f.command, "command", "", "command for /bin/sh whose standard output is the KEK: 16, 24 or 32 bytes")
	fl.StringArrayVar(&f.old, "old-command", nil, "command that prints a KEK which only decrypts; may be repeated")
	fl.StringVar(&f.encoding, "encoding", string(command.Raw), "what the commands print: raw, base64 or hex; a newline behind it is forgiven where it cannot be a part of the key")
	fl.DurationVar(&f.deadline, "deadline", 0, fmt.Sprintf("of one run of a command, which is then killed with all that it started (default: %s, or half of a fifth of --timeout)", command.DefaultDeadline))
	f.wrapped.add(cmd)
	fl.BoolVar(&f.init, "init", false, "make the KEK if there is none: the file of --wrapped-kek, or the key service's record of --volume")
	fl.StringVar(&f.agent, "agent-config", "", "configuration of keyagent agent, which says where the key service is and what this machine proves")
	fl.StringVar(&f.volume, "volume", "", "ID under which the key service keeps the KEK; no disk may have it")
}

// check refuses flags that name no source, or not one. It runs and asks nothing.
func (f *kekSourceFlags) check(timeout time.Duration) error {
	const hint = "one of --command, --kms with --wrapped-kek, or --agent-config with --volume"
	given := 0
	for _, s := range []string{f.command, f.wrapped.kms, f.agent} {
		if s != "" {
			given++
		}
	}
	switch {
	case given != 1:
		return failure.Newf(failure.Usage, hint, "%d sources of the KEK are named, exactly one is needed", given)
	case (f.wrapped.kms == "") != (f.wrapped.path == ""), (f.agent == "") != (f.volume == ""):
		return failure.Newf(failure.Usage, hint, "a part of the source is missing, or is one of another source")
	case f.command == "" && (len(f.old) > 0 || f.deadline != 0 || f.encoding != string(command.Raw)):
		return failure.Newf(failure.Usage, hint, "--old-command, --encoding and --deadline go with --command")
	case f.command != "" && f.init:
		return failure.Newf(failure.Usage, hint, "--init goes with --kms or --agent-config")
	case f.command != "":
		_, err := f.commands(timeout, nil)
		return err
	}
	return nil
}

// runsCommand reports whether the source is a command, or a KMS that is one. What cannot
// be read is refused when it is opened.
func (f *kekSourceFlags) runsCommand() bool {
	r, err := setup.ReachOf(f.wrapped.kms)
	return f.command != "" || err == nil && r.Commands
}

// files are those of a source that runs no command.
func (f *kekSourceFlags) files() (p confine.Paths, err error) {
	if f.agent != "" {
		cfg, err := node.Load(f.agent)
		if err != nil {
			return p, err
		}
		return cfg.Reach()
	}
	r, err := setup.ReachOf(f.wrapped.kms)
	return confine.Paths{
		Read: append(r.Read, f.wrapped.path, os.Getenv("CREDENTIALS_DIRECTORY")), Write: r.Write, Anything: r.Anything,
	}, err
}

// open returns the source, and what closes its connections.
func (f *kekSourceFlags) open(ctx context.Context, timeout time.Duration, log *slog.Logger) (kubekms.Source, io.Closer, error) {
	switch {
	case f.command != "":
		source, err := f.commands(timeout, log)
		return source, nothing{}, err
	case f.agent != "":
		return f.openAttested(ctx, timeout, log)
	}
	file, err := f.wrapped.open(ctx)
	if err != nil {
		return nil, nil, err
	}
	if f.init {
		if err := file.Init(ctx); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, nil, errors.Join(err, file.Close())
		}
	}
	return file, file, nil
}

// commands is the source of those, none of which runs yet.
func (f *kekSourceFlags) commands(timeout time.Duration, log *slog.Logger) (kubekms.Source, error) {
	interval := kubekms.Interval(timeout)
	if f.deadline == 0 {
		f.deadline = min(command.DefaultDeadline, interval/2)
	}
	if f.deadline < 0 || f.deadline > interval*9/10 {
		return nil, failure.Newf(failure.Usage, "a shorter deadline, or a longer --timeout",
			"a deadline of %s does not fit: the command runs each %s", f.deadline, interval)
	}
	var all []kubekms.Fetcher
	for _, text := range append([]string{f.command}, f.old...) {
		s, err := command.NewSource(command.Options{Command: text, Encoding: command.Encoding(f.encoding), Deadline: f.deadline, Log: log})
		if err != nil {
			return nil, failure.New(failure.Usage, err, "")
		}
		all = append(all, s)
	}
	return kubekms.FromFetchers(all[0], all[1:]...), nil
}

func (f *kekSourceFlags) openAttested(ctx context.Context, timeout time.Duration, log *slog.Logger) (kubekms.Source, io.Closer, error) {
	cfg, err := node.Load(f.agent)
	if err != nil {
		return nil, nil, err
	}
	client, closer, err := cfg.KeyClient(log, nil)
	if err != nil {
		return nil, nil, err
	}
	// The KEK stays in this process's memory, so that its session may, too: a key is
	// fetched every few seconds.
	client.Hold()
	source := &kubekms.Attested{Keys: client, Volume: f.volume, Left: kubekms.Lease(timeout)}
	if f.init {
		if err := source.Init(ctx); err != nil {
			return nil, nil, errors.Join(err, closer.Close())
		}
	}
	return source, closer, nil
}

// wrappedFlags name a file of wrapped KEKs.
type wrappedFlags struct{ kms, path string }

func (f *wrappedFlags) add(cmd *cobra.Command) {
	cmd.Flags().StringVar(&f.kms, "kms", "", "kms:// URI of the key management that wraps the KEK")
	cmd.Flags().StringVar(&f.path, "wrapped-kek", "", "file of the wrapped KEKs; goes with --kms")
}

// openWrapped is a file with the connection to its KMS.
type openWrapped struct {
	*kubekms.WrappedFile
	io.Closer
}

func (f *wrappedFlags) open(ctx context.Context) (*openWrapped, error) {
	if f.kms == "" || f.path == "" {
		return nil, failure.Newf(failure.Usage, "--kms URI --wrapped-kek FILE", "the key management and the file must be named")
	}
	if err := refuseSecrets(f.kms); err != nil {
		return nil, err
	}
	k, err := setup.KMS(ctx, f.kms)
	if err != nil {
		return nil, keyservice.BackendError(fmt.Errorf("%s: %w", setup.Redact(f.kms), err))
	}
	return &openWrapped{&kubekms.WrappedFile{Path: f.path, KMS: k, Classify: keyservice.BackendError}, k}, nil
}

// nothing is to be closed.
type nothing struct{}

// Close implements io.Closer.
func (nothing) Close() error { return nil }
