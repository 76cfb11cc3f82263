package setup

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/keyagent/keyagent/kms"
	"github.com/keyagent/keyagent/kms/cluster"
)

// A sealed master secret opens with what was given, and with nothing else.
func TestASealedKMSWantsItsSecret(t *testing.T) {
	const uri = "kms://cluster-kms?sealedFile=/etc/keyagent/master.sealed"
	if got := SealedFile(uri); got != "/etc/keyagent/master.sealed" {
		t.Errorf("%q", got)
	}
	for _, other := range []string{"kms://cluster-kms?file=x", "kms://aws?keyName=k", "nonsense"} {
		if got := SealedFile(other); got != "" {
			t.Errorf("%s: %q", other, got)
		}
	}
	if _, err := KMS(t.Context(), uri); !errors.Is(err, ErrSealed) {
		t.Error(err)
	}
	path := filepath.Join(t.TempDir(), "master")
	if err := cluster.InitMasterSecret(path); err != nil {
		t.Fatal(err)
	}
	master, err := cluster.LoadMasterSecret(path)
	if err != nil {
		t.Fatal(err)
	}
	k, err := Unsealed(t.Context(), uri, master)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	if err := master.Close(); err != nil { // the KMS has one of its own
		t.Fatal(err)
	}
	same, err := KMS(t.Context(), "kms://cluster-kms?file="+path)
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	b := kms.Binding{VolumeID: "data-1", Purpose: kms.VolumeDEK, Version: 1, Length: 32}
	one, _, err := k.Generate(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	defer one.Close()
	two, _, err := same.Generate(t.Context(), b)
	if err != nil {
		t.Fatal(err)
	}
	defer two.Close()
	if !one.Equal(two) {
		t.Error("it gives other keys")
	}
	for name, uri := range map[string]string{"of a file": "kms://cluster-kms?file=" + path + "&sealedFile=x", "of a cloud": "kms://aws?keyName=k"} {
		if _, err := Unsealed(t.Context(), uri, two); !errors.Is(err, kms.ErrURI) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := Unsealed(t.Context(), uri, nil); !errors.Is(err, kms.ErrURI) {
		t.Error(err)
	}
}

// A URI may leave the master secret to other key services; and of one that does not, it is had by
// itself, for them.
func TestTheMasterSecretOfAURI(t *testing.T) {
	path := filepath.Join(t.TempDir(), "master")
	if err := cluster.InitMasterSecret(path); err != nil {
		t.Fatal(err)
	}
	master, err := MasterSecret(t.Context(), "kms://cluster-kms?file="+path+"&salt=c29tZSBzYWx0")
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	k, err := Unsealed(t.Context(), "kms://cluster-kms?joined=true&salt=c29tZSBzYWx0", master)
	if err != nil {
		t.Fatal(err)
	}
	defer k.Close()
	same, err := KMS(t.Context(), "kms://cluster-kms?file="+path+"&salt=c29tZSBzYWx0")
	if err != nil {
		t.Fatal(err)
	}
	defer same.Close()
	mine, err := k.Current(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if its, err := same.Current(t.Context()); err != nil || its != mine {
		t.Errorf("two KEKs, %s and %s, %v", mine, its, err)
	}
	for uri, want := range map[string]error{
		"kms://cluster-kms?joined=true":                ErrJoined,
		"kms://cluster-kms?sealedFile=x":               ErrSealed,
		"kms://cluster-kms?joined=false":               kms.ErrURI,
		"kms://cluster-kms?joined=true&file=x":         kms.ErrURI,
		"kms://cluster-kms?joined=true&more=x":         kms.ErrURI,
		"kms://command?command=false":                  nil,
		"kms://cluster-kms?wrappedFile=x&joined=true":  kms.ErrURI,
		"kms://cluster-kms?joined=true&wrappedBy=kms:": kms.ErrURI,
	} {
		s, err := MasterSecret(t.Context(), uri)
		if s != nil || !errors.Is(err, want) {
			t.Errorf("%s: %v, %v", uri, s, err)
		}
	}
	if !Joined("kms://cluster-kms?joined=true") || Joined("kms://cluster-kms?file=x") || Joined("kms://aws?joined=true") || WrappedFile("kms://cluster-kms?wrappedFile=x") != "x" {
		t.Error("what a URI leaves to others is not told")
	}
}
