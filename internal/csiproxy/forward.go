package csiproxy

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/encoding/proto"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	protobuf "google.golang.org/protobuf/proto"
)

// frame is a message that is passed on as it is: a field that this program does not know
// yet is not lost.
type frame struct{ data []byte }

// frames is the codec of protobuf, and of frames.
type frames struct{ encoding.CodecV2 }

func codec() encoding.CodecV2 { return frames{encoding.GetCodecV2(proto.Name)} }

func (f frames) Marshal(v any) (mem.BufferSlice, error) {
	if raw, ok := v.(*frame); ok {
		return mem.BufferSlice{mem.SliceBuffer(raw.data)}, nil
	}
	return f.CodecV2.Marshal(v)
}

func (f frames) Unmarshal(data mem.BufferSlice, v any) error {
	if raw, ok := v.(*frame); ok {
		raw.data = data.Materialize()
		return nil
	}
	return f.CodecV2.Unmarshal(data, v)
}

// rewrite changes what passes: a request and its answer. Each function may be nil.
type rewrite struct {
	refuse  func(*Config) error // the call as such
	request func(*Config, protobuf.Message)
	answer  func(c *Config, request, answer protobuf.Message)
	// types of both
	newRequest, newAnswer func() protobuf.Message
}

// forward passes on what no server of this process takes: all of the controller's
// services, and whatever a later version of the specification adds to them. A call of the
// node's service that is not known here is refused: it could lead round the encryption.
func (p *Proxy) forward(_ any, in grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(in)
	if !ok {
		return status.Error(codes.Internal, "a call without a name")
	}
	if !passes(method) {
		return status.Errorf(codes.Unimplemented, "%.128q is not known to the encryption of this node", method)
	}
	change, changed := rewrites[method]
	if change.refuse != nil {
		if err := change.refuse(p.cfg); err != nil {
			return err
		}
	}
	var request frame
	if err := in.RecvMsg(&request); err != nil {
		return err
	}
	var sent protobuf.Message
	if changed {
		sent = change.newRequest()
		if err := protobuf.Unmarshal(request.data, sent); err != nil {
			return status.Errorf(codes.InvalidArgument, "request: %v", err)
		}
		original := protobuf.Clone(sent)
		change.request(p.cfg, sent)
		var err error
		if request.data, err = protobuf.Marshal(sent); err != nil {
			return err
		}
		sent = original
	}
	return p.relay(in, method, &request, func(answer *frame) error {
		if !changed || change.answer == nil {
			return nil
		}
		m := change.newAnswer()
		err := protobuf.Unmarshal(answer.data, m)
		if err == nil {
			change.answer(p.cfg, sent, m)
			answer.data, err = protobuf.Marshal(m)
		}
		return err
	})
}

// relay sends one request to the driver, and all answers back.
func (p *Proxy) relay(in grpc.ServerStream, method string, request *frame, change func(*frame) error) error {
	ctx, cancel := context.WithCancel(in.Context())
	defer cancel()
	out, err := p.conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method, grpc.ForceCodecV2(codec()))
	if err != nil {
		return err
	}
	if err := out.SendMsg(request); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if err := out.CloseSend(); err != nil {
		return err
	}
	for {
		var answer frame
		switch err := out.RecvMsg(&answer); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}
		if err := change(&answer); err != nil {
			return err
		}
		if err := in.SendMsg(&answer); err != nil {
			return err
		}
	}
}
