package memfs

import (
	"testing"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

func TestConformance(t *testing.T) {
	storagetest.Run(t, func(*testing.T) func() storage.Storage {
		s := New()
		return func() storage.Storage { return s }
	})
}
