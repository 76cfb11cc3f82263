package main

import (
	"context"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
)

// dataKey asks as the clients of Constellation's key service do, and compares what comes:
// a key in hex, or a gRPC code. The ID is what Go's escapes make of it.
//
//	datakey SOCKET ID LENGTH KEY|CODE
//
// The request is put together by its numbers on the wire, and not by code of this
// project's, which may have the names wrong on both sides.
func dataKey(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 4 {
		ts.Fatalf("usage: datakey SOCKET ID LENGTH KEY|CODE")
	}
	id, err := strconv.Unquote(`"` + args[1] + `"`)
	ts.Check(err)
	if n, ok := strings.CutPrefix(id, "long:"); ok {
		times, err := strconv.Atoi(n)
		ts.Check(err)
		id = strings.Repeat("a", times)
	}
	length, err := strconv.ParseUint(args[2], 10, 32)
	ts.Check(err)
	conn, err := grpc.NewClient("unix:"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	ts.Check(err)
	defer conn.Close()
	request := protowire.AppendString(protowire.AppendTag(nil, 1, protowire.BytesType), id)
	request = protowire.AppendVarint(protowire.AppendTag(request, 2, protowire.VarintType), length)
	var response []byte
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	err = conn.Invoke(ctx, "/kms.API/GetDataKey", request, &response, grpc.ForceCodec(asIs{}), grpc.WaitForReady(true))
	got := status.Code(err).String()
	if err == nil {
		number, kind, n := protowire.ConsumeTag(response)
		key, m := protowire.ConsumeBytes(response[max(n, 0):])
		if number != 1 || kind != protowire.BytesType || n+m != len(response) {
			ts.Fatalf("the answer is %x", response)
		}
		got = hex.EncodeToString(key)
	}
	if got != args[3] {
		ts.Fatalf("%s, %v; want %s", got, err, args[3])
	}
}

// asIs is a codec for messages that are encoded already.
type asIs struct{}

func (asIs) Marshal(v any) ([]byte, error) { return v.([]byte), nil }

func (asIs) Unmarshal(data []byte, v any) error {
	to, ok := v.(*[]byte)
	if !ok {
		return fmt.Errorf("%T", v)
	}
	*to = data
	return nil
}

func (asIs) Name() string { return "proto" }
