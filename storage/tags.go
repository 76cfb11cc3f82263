package storage

import (
	"errors"
	"net/url"

	"github.com/keyagent/keyagent/internal/pattern"
)

// Tags are names and values that a cloud's storage keeps beside an object, for its
// bills and rules. Nothing follows from them here.
type Tags map[string]string

// maxTags is what S3 and Azure Blob Storage take for an object.
const maxTags = 10

// What all three clouds take. Google's metadata, alone, would take more.
var (
	tagName  = pattern.New(`^[A-Za-z][A-Za-z0-9._-]{0,62}$`)
	tagValue = pattern.New(`^[A-Za-z0-9._/=+ -]{0,128}$`)
)

// Check returns an error unless every cloud takes the tags.
func (t Tags) Check() error {
	if len(t) > maxTags {
		return errors.New("an object takes at most 10 tags")
	}
	for name, value := range t {
		if !tagName.MatchString(name) || !tagValue.MatchString(value) {
			return errors.New("a tag's name begins with a letter, and has 63 letters, digits, dots, dashes and underscores at most; its value has 128 of them at most, or of spaces and / = +")
		}
	}
	return nil
}

// Encode gives the form that S3 and Azure Blob Storage take in a header: a URL's query.
func (t Tags) Encode() string {
	all := url.Values{}
	for name, value := range t {
		all.Set(name, value)
	}
	return all.Encode()
}
