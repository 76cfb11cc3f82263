package memfs

import (
	"testing"

	"github.com/keyagent/keyagent/storage"
	"github.com/keyagent/keyagent/storage/storagetest"
)

func TestConformance(t *testing.T) {
	storagetest.Run(t, func(*testing.T) storagetest.Bed {
		s := New()
		return storagetest.Bed{Open: func() storage.Storage { return s }}
	})
}
