package storage

import (
	"fmt"
	"strings"
	"testing"
)

func TestTagsAreThoseThatEveryCloudTakes(t *testing.T) {
	eleven := Tags{}
	for i := range 11 {
		eleven[fmt.Sprint("n", i)] = "v"
	}
	for name, tt := range map[string]struct {
		tags Tags
		ok   bool
	}{
		"none":                 {nil, true},
		"an empty value":       {Tags{"a": ""}, true},
		"a path":               {Tags{"cost-center": "eu/disks = 1+1"}, true},
		"the longest":          {Tags{strings.Repeat("a", 63): strings.Repeat("b", 128)}, true},
		"no name":              {Tags{"": "b"}, false},
		"a long name":          {Tags{strings.Repeat("a", 64): "b"}, false},
		"a long value":         {Tags{"a": strings.Repeat("b", 129)}, false},
		"a name with a number": {Tags{"1a": "b"}, false},
		"an ampersand":         {Tags{"a": "b&c=d"}, false},
		"a line break":         {Tags{"a": "b\r\nX-Amz-Acl: public-read"}, false},
		"eleven":               {eleven, false},
	} {
		t.Run(name, func(t *testing.T) {
			if err := tt.tags.Check(); (err == nil) != tt.ok {
				t.Error(err)
			}
		})
	}
	if got := (Tags{"b": "x y", "a": "1/2"}).Encode(); got != "a=1%2F2&b=x+y" {
		t.Error(got)
	}
}
