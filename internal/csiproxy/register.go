package csiproxy

import (
	"context"
	"net"

	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	registrationv1 "github.com/keyagent/keyagent/api/kubelet/pluginregistration/v1"
	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/unixsocket"
)

// registration tells kubelet where the driver's socket is: at the proxy.
type registration struct {
	registrationv1.UnimplementedRegistrationServer
	*Proxy
}

// specVersion is that of the specification. Kubelet takes the higher one of two drivers
// with one name: a registrar of the driver's own says 1.0.0.
const specVersion = "1.13.0"

// GetInfo implements the service. The name is asked of the driver: the proxy has none.
func (r registration) GetInfo(ctx context.Context, _ *registrationv1.InfoRequest) (*registrationv1.PluginInfo, error) {
	info, err := csi.NewIdentityClient(r.conn).GetPluginInfo(ctx, &csi.GetPluginInfoRequest{})
	if err != nil {
		return nil, ofDriver("GetPluginInfo", err)
	}
	return &registrationv1.PluginInfo{Type: "CSIPlugin", Name: info.GetName(), Endpoint: r.cfg.Listen, SupportedVersions: []string{specVersion}}, nil
}

// NotifyRegistrationStatus implements the service.
func (r registration) NotifyRegistrationStatus(_ context.Context, s *registrationv1.RegistrationStatus) (*registrationv1.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.log.Info("registered with kubelet")
	} else {
		select {
		case r.refused <- failure.Newf(failure.State, "does the driver's own node-driver-registrar still run?", "kubelet did not register the driver: %.500s", s.GetError()):
		default:
		}
	}
	return &registrationv1.RegistrationStatusResponse{}, nil
}

// RegistrationServer returns the server for a socket in kubelet's plugins_registry.
func (p *Proxy) RegistrationServer() *grpc.Server {
	s := grpc.NewServer(grpc.Creds(unixsocket.Credentials(p.admit)))
	registrationv1.RegisterRegistrationServer(s, registration{Proxy: p})
	return s
}

// Serve serves kubelet's sockets, until ctx ends or one of them fails.
func (p *Proxy) Serve(ctx context.Context, ready func()) error {
	servers := []struct {
		path   string
		server *grpc.Server
	}{{p.cfg.Listen, p.Server()}, {p.cfg.Registration, p.RegistrationServer()}}
	failed := make(chan error, len(servers))
	var listeners []net.Listener
	defer func() {
		for _, l := range listeners {
			_ = l.Close()
		}
	}()
	for _, s := range servers {
		if s.path == "" {
			continue
		}
		l, err := Listen(s.path)
		if err != nil {
			return err
		}
		listeners = append(listeners, l)
		go func() { failed <- s.server.Serve(l) }()
	}
	ready()
	select {
	case err := <-failed:
		return err
	case err := <-p.refused:
		// Somebody else is kubelet's driver, and may write volumes in plain text.
		return err
	case <-ctx.Done():
		// Kubelet asks again whatever is cut off here.
		for _, s := range servers {
			s.server.Stop()
		}
		return nil
	}
}
