// Package wire decodes protobuf messages of strangers. A message of a megabyte can
// hold half a million empty ones, each of which costs a hundred times its two bytes
// once it is decoded: what a message holds is therefore counted before anything is
// allocated for it.
package wire

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// MaxFields bounds the fields of one message, with those of the messages in it and
// each element of a list. The largest honest messages have about fifty.
const MaxFields = 256

// maxDepth bounds messages in messages. The deepest of this project has four.
const maxDepth = 8

// ErrFields means that a message holds more than any honest one.
var ErrFields = errors.New("message has too many fields")

// Unmarshal decodes data into m, after it has counted what data holds.
func Unmarshal(data []byte, m proto.Message) error {
	if err := Check(data, m.ProtoReflect().Descriptor()); err != nil {
		return err
	}
	return proto.Unmarshal(data, m)
}

// Check counts the fields of data, which is a message as desc describes it.
func Check(data []byte, desc protoreflect.MessageDescriptor) error {
	left := MaxFields
	return count(data, desc, &left, maxDepth)
}

func count(data []byte, desc protoreflect.MessageDescriptor, left *int, depth int) error {
	if depth == 0 {
		return fmt.Errorf("%w: messages are nested deeper than %d", ErrFields, maxDepth)
	}
	for len(data) > 0 {
		number, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return protowire.ParseError(n)
		}
		data = data[n:]
		if n = protowire.ConsumeFieldValue(number, kind, data); n < 0 {
			return protowire.ParseError(n)
		}
		value := data[:n]
		data = data[n:]
		if *left--; *left < 0 {
			return fmt.Errorf("%w: more than %d", ErrFields, MaxFields)
		}
		field := desc.Fields().ByNumber(number)
		if field == nil || kind != protowire.BytesType {
			continue // one value, or none that is known
		}
		value, _ = protowire.ConsumeBytes(value)
		switch field.Kind() {
		case protoreflect.MessageKind:
			if err := count(value, field.Message(), left, depth-1); err != nil {
				return err
			}
		case protoreflect.StringKind, protoreflect.BytesKind:
		default: // a packed list
			if *left -= elements(value); *left < 0 {
				return fmt.Errorf("%w: more than %d", ErrFields, MaxFields)
			}
		}
	}
	return nil
}

// elements is how many varints a packed list has. No message here has a list of
// numbers of a fixed size.
func elements(packed []byte) (n int) {
	for _, b := range packed {
		if b < 0x80 {
			n++
		}
	}
	return n
}
