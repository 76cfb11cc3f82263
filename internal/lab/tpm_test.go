package lab

import (
	"bytes"
	"encoding/binary"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
)

func TestTPMsOfTwoCAsHaveCertificatesOfTheirOwnCAOnly(t *testing.T) {
	for _, names := range [][2]string{{"first", "second"}, {"second", "first"}} {
		ca, err := NewCA(filepath.Join(t.TempDir(), "ca"), names[0])
		if err != nil {
			t.Fatal(err)
		}
		tpm, err := ca.NewTPM(t.Context(), filepath.Join(t.TempDir(), "tpm"), TPMOptions{})
		if err != nil {
			t.Fatal(err)
		}
		state := filepath.Join(tpm.Dir, "tpm2-00.permall")
		// RSA and elliptic curve endorsement keys, and the platform.
		if n, err := SearchFile(state, []byte(names[0]+" EK CA")); err != nil || n != 3 {
			t.Errorf("%d certificates of its own CA, %v; want 3", n, err)
		}
		if n, err := SearchFile(state, []byte(names[1]+" EK CA")); err != nil || n != 0 {
			t.Errorf("%d certificates of the other CA, %v", n, err)
		}
	}
}

func TestCAIsOpenedAgain(t *testing.T) {
	dir := t.TempDir()
	read := func() []byte {
		ca, err := NewCA(dir, "ca")
		if err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(ca.RootCert())
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	if !bytes.Equal(read(), read()) {
		t.Error("the second call made another CA")
	}
}

// getRandom is TPM2_GetRandom of 8 bytes.
var getRandom = []byte{0x80, 0x01, 0, 0, 0, 12, 0, 0, 0x01, 0x7b, 0, 8}

func TestServedTPMAnswersSeveralConnectionsAtOnce(t *testing.T) {
	ca, err := NewCA(filepath.Join(t.TempDir(), "ca"), "ca")
	if err != nil {
		t.Fatal(err)
	}
	original, err := ca.NewTPM(t.Context(), filepath.Join(t.TempDir(), "tpm"), TPMOptions{Banks: []string{"sha256", "sha384"}})
	if err != nil {
		t.Fatal(err)
	}
	tpm, err := original.Clone(filepath.Join(t.TempDir(), "clone"))
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "tpm.sock")
	stop, err := tpm.Serve(t.Context(), socket)
	if err != nil {
		t.Fatal(err)
	}
	var conns []net.Conn
	for range 3 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		conns = append(conns, conn)
	}
	for range 2 {
		for _, conn := range conns {
			if _, err := conn.Write(getRandom); err != nil {
				t.Fatal(err)
			}
		}
		for _, conn := range conns {
			answer, err := readMessage(conn)
			if err != nil || len(answer) != 20 || binary.BigEndian.Uint32(answer[6:]) != 0 {
				t.Fatalf("answer %x, %v", answer, err)
			}
		}
	}
	stop()
	if _, err := conns[0].Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlives the TPM")
	}
	if exists(socket) {
		t.Error("the socket is left behind")
	}
	stop() // once more does no harm
}
