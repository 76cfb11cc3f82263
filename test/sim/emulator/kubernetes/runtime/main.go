// Command runtime is a container runtime that starts no container: for a kubelet
// whose pods are about their volumes. Usage: runtime SOCKET
package main

import (
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"k8s.io/cri-client/pkg/fake"
)

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "runtime:", err)
		os.Exit(1)
	}
}

func run() error {
	if len(os.Args) != 2 {
		return fmt.Errorf("usage: runtime SOCKET")
	}
	server := fake.NewFakeRemoteRuntime()
	server.ImageService.SetFakeImageSize(1) // a kubelet believes in no image of none, once it is there
	if err := server.Start("unix://" + os.Args[1]); err != nil {
		return err
	}
	defer server.Stop()
	end := make(chan os.Signal, 1)
	signal.Notify(end, os.Interrupt, syscall.SIGTERM)
	<-end
	return nil
}
