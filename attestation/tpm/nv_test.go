package tpm

import (
	"bytes"
	"errors"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/test/sim/swtpm"
)

func fill(b byte) []byte { return bytes.Repeat([]byte{b}, 762) }

func TestAnIndexKeepsWhatWasStored(t *testing.T) {
	device := swtpm.New(t, nil).Device
	n := &NV{Device: device, Index: 0x018B4B57, Size: 762}
	if got, err := n.Load(); err != nil || got != nil {
		t.Fatalf("before the first write: %d bytes, %v", len(got), err)
	}
	for _, b := range []byte{1, 2} {
		if err := n.Store(fill(b)); err != nil {
			t.Fatal(err)
		}
		if got, err := n.Load(); err != nil || !bytes.Equal(got, fill(b)) {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
	}
	if err := n.Store(fill(1)[:761]); !errors.Is(err, ErrNV) {
		t.Errorf("another size: %v", err)
	}
	if err := (&NV{Device: device, Index: 0x018B4B57, Size: 763}).Store(append(fill(1), 1)); !errors.Is(err, ErrNV) {
		t.Errorf("an index of another size: %v", err)
	}
	if got, err := n.Load(); err != nil || !bytes.Equal(got, fill(2)) {
		t.Errorf("after what was refused: %v", err)
	}
	if _, err := (&NV{Device: "/nonexistent", Index: 1, Size: 1}).Load(); !errors.Is(err, attestation.ErrNoDevice) {
		t.Errorf("no TPM: %v", err)
	}
}

// A TPM whose owner hierarchy has a password gives nobody an index.
func TestAnOwnedTPMIsRefused(t *testing.T) {
	device := swtpm.New(t, nil).Device
	dev, err := OpenDevice(device)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.HierarchyChangeAuth{
		AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHOwner, Auth: tpm2.PasswordAuth(nil)},
		NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("secret")},
	}.Execute(dev)
	if err := errors.Join(err, dev.Close()); err != nil {
		t.Fatal(err)
	}
	n := &NV{Device: device, Index: 0x018B4B57, Size: 762}
	if err := n.Store(fill(1)); !errors.Is(err, ErrNV) || !bytes.Contains([]byte(err.Error()), []byte("password")) {
		t.Errorf("got %v", err)
	}
	if got, err := n.Load(); err != nil || got != nil {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
