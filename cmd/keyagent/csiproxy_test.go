package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"go.yaml.in/yaml/v3"

	"github.com/keyagent/keyagent/internal/csiproxy"
	"github.com/keyagent/keyagent/internal/node"
)

// TestTheCSIManifestStartsWhatThereIs holds deploy/kubernetes, the flags and the
// configuration's fields together.
func TestTheCSIManifestStartsWhatThereIs(t *testing.T) {
	data, err := os.ReadFile("../../deploy/kubernetes/keyagent-csi.yaml")
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for dec := yaml.NewDecoder(bytes.NewReader(data)); ; {
		var object struct {
			Kind string
			Data map[string]string
			Spec struct {
				Template struct {
					Spec struct {
						Containers []struct{ Command []string }
					}
				}
			}
		}
		err := dec.Decode(&object)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		seen[object.Kind] = true
		switch object.Kind {
		case "ConfigMap":
			path := filepath.Join(t.TempDir(), "csi.yaml")
			write(t, path, object.Data["csi.yaml"])
			if _, err := csiproxy.Load(path); err != nil {
				t.Error(err)
			}
		case "DaemonSet":
			found, args, err := newRoot().Find(object.Spec.Template.Spec.Containers[0].Command[1:])
			if err != nil || found.Name() != "csi-proxy" {
				t.Fatalf("%v, %v", found, err)
			}
			if err := found.ParseFlags(args); err != nil {
				t.Error(err)
			}
		}
	}
	for _, kind := range []string{"ConfigMap", "DaemonSet", "CSIDriver", "StorageClass"} {
		if !seen[kind] {
			t.Errorf("there is no %s", kind)
		}
	}
}

// TestThePageOnCSIIsRight loads what docs/csi.md says to write.
func TestThePageOnCSIIsRight(t *testing.T) {
	page, err := os.ReadFile("../../docs/csi.md")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	certificates(t, dir)
	loaded := 0
	for _, m := range regexp.MustCompile("(?s)```yaml\n(.*?)```").FindAllStringSubmatch(string(page), -1) {
		text := regexp.MustCompile(`(?m)^   `).ReplaceAllString(m[1], "")
		path := filepath.Join(dir, "file.yaml")
		switch {
		case strings.HasPrefix(text, "driver:"):
			write(t, path, text)
			_, err = csiproxy.Load(path)
		case strings.HasPrefix(text, "callers:"):
			write(t, path, "servers: [{address: \"127.0.0.1:1\", ca: ca.pem}]\n"+text)
			_, err = node.Load(path)
		default:
			continue
		}
		if loaded++; err != nil {
			t.Errorf("%s\n%v", text, err)
		}
	}
	if loaded != 2 {
		t.Errorf("%d files are on the page", loaded)
	}
}
