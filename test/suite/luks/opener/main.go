// Command opener formats, opens or closes one volume with package luks and ends.
// It is the program that a benchmark runs beside cryptsetup; it takes its DEK
// from a file, and no production program does.
//
//	opener format DEVICE KEYFILE            prints the header's MAC
//	opener open   DEVICE KEYFILE MAC NAME
//	opener close  NAME
//	opener nothing                          what the process itself costs
package main

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/luks"
)

var id = luks.Identity{Volume: "bench", UUID: "0b5f6d0e-7c1a-4a52-9a86-3d0e6f1c2b4a", Generation: 1}

func main() {
	if err := run(context.Background(), os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "opener:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 3 && args[0] == "format":
		dek, err := readKey(args[2])
		if err != nil {
			return err
		}
		defer dek.Close()
		h, err := luks.NewHeader(ctx, id, luks.Layout{}, dek)
		if err != nil {
			return err
		}
		mac := h.MACs().Header
		fmt.Println(hex.EncodeToString(mac[:]))
		return luks.Write(ctx, luks.WriteRequest{Device: args[1], Identity: id, Header: h, Until: luks.DeadlineIn(time.Minute)}, dek)
	case len(args) == 5 && args[0] == "open":
		dek, err := readKey(args[2])
		if err != nil {
			return err
		}
		defer dek.Close()
		var mac luks.MAC
		if n, err := hex.Decode(mac[:], []byte(args[3])); err != nil || n != len(mac) {
			return errors.New("MAC is not 64 hexadecimal digits")
		}
		_, _, err = luks.Open(ctx, luks.OpenRequest{Device: args[1], Name: args[4], Identity: id, MACs: luks.MACs{Header: mac}}, dek)
		return err
	case len(args) == 2 && args[0] == "close":
		return luks.Close(ctx, luks.CloseRequest{Name: args[1], UUID: id.UUID})
	case len(args) == 1 && args[0] == "nothing":
		return nil
	default:
		return errors.New("usage: opener format|open|close|nothing …")
	}
}

func readKey(path string) (*secret.Bytes, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return secret.Read(f, luks.MaxKeySize)
}
