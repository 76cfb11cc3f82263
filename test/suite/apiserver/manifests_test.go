package apiserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"testing"

	"go.yaml.in/yaml/v3"
)

// places are where the API server takes each kind of object. "" is for a file of a
// program, which it does not take.
var places = map[string]string{
	"Namespace":               "/api/v1/namespaces",
	"ServiceAccount":          "/api/v1/namespaces/%/serviceaccounts",
	"ConfigMap":               "/api/v1/namespaces/%/configmaps",
	"Pod":                     "/api/v1/namespaces/%/pods",
	"DaemonSet":               "/apis/apps/v1/namespaces/%/daemonsets",
	"CSIDriver":               "/apis/storage.k8s.io/v1/csidrivers",
	"StorageClass":            "/apis/storage.k8s.io/v1/storageclasses",
	"EncryptionConfiguration": "",
}

// manifests has the API server judge what is in deploy/kubernetes as kubectl apply
// --dry-run=server --validate=strict does: a field that it does not know, or one that
// stands twice, is an error.
func (c *encrypting) manifests(t *testing.T) {
	t.Helper()
	const strict = "?dryRun=All&fieldValidation=Strict"
	files, err := filepath.Glob("../../../deploy/kubernetes/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("there are %q, %v", files, err)
	}
	taken, made := 0, map[any]bool{}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for dec := yaml.NewDecoder(bytes.NewReader(text)); ; {
			var object map[string]any
			err := dec.Decode(&object)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			kind, _ := object["kind"].(string)
			place, known := places[kind]
			if !known {
				t.Errorf("%s: the kind %q is not one that is tried", file, kind)
			}
			if place == "" {
				continue
			}
			meta, _ := object["metadata"].(map[string]any)
			if kind == "Namespace" { // each file has it, so that each can be applied alone
				if made[meta["name"]] {
					continue
				}
				made[meta["name"]] = true
			}
			namespace, _ := meta["namespace"].(string)
			place = string(bytes.ReplaceAll([]byte(place), []byte("%"), []byte(namespace)))
			body, err := json.Marshal(object)
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			status, answer, err := c.Request(http.MethodPost, place+strict, string(body))
			if err != nil || status != http.StatusCreated {
				t.Errorf("%s: %s: %d: %s: %v", file, kind, status, answer, err)
			}
			if kind == "Namespace" { // the others are in it
				c.Create(t, place, string(body))
			}
			taken++
			meta["unheardOf"] = "x"
			body, _ = json.Marshal(object)
			if status, _, err := c.Request(http.MethodPost, place+strict, string(body)); err != nil || status == http.StatusCreated {
				t.Errorf("%s: %s: a field that nobody knows is taken: %v", file, kind, err)
			}
		}
	}
	if taken < 7 {
		t.Errorf("%d objects were tried", taken)
	}
}
