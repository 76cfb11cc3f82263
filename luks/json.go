package luks

import (
	"bytes"
	"encoding/json"
	"io"
)

// maxDepth is one more level than the whitelist nests.
const maxDepth = 6

// node is one JSON value. Go's decoder alone will not do here: it takes the last
// of two equal keys, folds the case of names and replaces bytes that are not
// UTF-8, and where two parsers read one text differently a hostile header hides.
type node struct {
	kind  nodeKind
	text  string // of a text, or the literal of a number, a boolean or null
	keys  []string
	child map[string]*node // of an object
	items []*node          // of a list
}

type nodeKind int

const (
	kindText nodeKind = iota
	kindNumber
	kindOther
	kindObject
	kindList
)

// parseArea reads a JSON area: one object, then NULs to the end.
func parseArea(area []byte) (*node, error) {
	text, rest, found := bytes.Cut(area, []byte{0})
	if !found {
		return nil, refuse(RuleJSONSize, "JSON area", "")
	}
	if !allZero(rest) {
		return nil, refuse(RuleTrailing, "JSON area", "")
	}
	return parseJSON(text)
}

// parseJSON reads one JSON object from text. What libcryptsetup writes is plain:
// printable ASCII without blanks and escapes. Anything else is refused before it
// is parsed, which leaves one way to write each value.
func parseJSON(text []byte) (*node, error) {
	if len(text) >= jsonSize {
		return nil, refuse(RuleJSONSize, "JSON area", "")
	}
	for _, c := range text {
		if c <= ' ' || c > '~' || c == '\\' {
			return nil, refuse(RuleJSONSyntax, "JSON area", string(rune(c)))
		}
	}
	// The depth is bounded before anything recurses.
	depth, inText := 0, false
	for _, c := range text {
		switch {
		case c == '"':
			inText = !inText
		case inText:
		case c == '{' || c == '[':
			if depth++; depth > maxDepth {
				return nil, refuse(RuleJSONDepth, "JSON area", "")
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	if !json.Valid(text) {
		return nil, refuse(RuleJSONSyntax, "JSON area", "")
	}
	dec := json.NewDecoder(bytes.NewReader(text))
	dec.UseNumber()
	root, err := parseValue(dec, "JSON area")
	if err != nil {
		return nil, err
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, refuse(RuleTrailing, "JSON area", "")
	}
	if root.kind != kindObject {
		return nil, refuse(RuleFieldType, "JSON area", "")
	}
	return root, nil
}

func parseValue(dec *json.Decoder, where string) (*node, error) {
	token, err := dec.Token()
	if err != nil {
		return nil, refuse(RuleJSONSyntax, where, "")
	}
	switch t := token.(type) {
	case string:
		return &node{kind: kindText, text: t}, nil
	case json.Number:
		return &node{kind: kindNumber, text: t.String()}, nil
	case json.Delim:
		if t == '{' {
			return parseObject(dec, where)
		}
		list := &node{kind: kindList}
		for dec.More() {
			item, err := parseValue(dec, where)
			if err != nil {
				return nil, err
			}
			list.items = append(list.items, item)
		}
		return list, closing(dec, where)
	case bool:
		return &node{kind: kindOther, text: map[bool]string{true: "true", false: "false"}[t]}, nil
	default:
		return &node{kind: kindOther, text: "null"}, nil
	}
}

func parseObject(dec *json.Decoder, where string) (*node, error) {
	n := &node{kind: kindObject, child: map[string]*node{}}
	for dec.More() {
		token, err := dec.Token()
		key, ok := token.(string)
		if err != nil || !ok {
			return nil, refuse(RuleJSONSyntax, where, "")
		}
		if _, twice := n.child[key]; twice {
			return nil, refuse(RuleDuplicateKey, where, key)
		}
		value, err := parseValue(dec, join(where, key))
		if err != nil {
			return nil, err
		}
		n.keys = append(n.keys, key)
		n.child[key] = value
	}
	return n, closing(dec, where)
}

// closing takes the delimiter that ends an object or a list.
func closing(dec *json.Decoder, where string) error {
	if _, err := dec.Token(); err != nil {
		return refuse(RuleJSONSyntax, where, "")
	}
	return nil
}

// join makes the path of a field, bounded since its parts are the attacker's.
func join(where, key string) string {
	if len(key) > 32 {
		key = key[:32] + "…"
	}
	if where == "JSON area" {
		return key
	}
	return where + "." + key
}
