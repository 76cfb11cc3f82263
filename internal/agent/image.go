package agent

import (
	"context"
	"fmt"
	"slices"

	"github.com/keyagent/keyagent/internal/failure"
	"github.com/keyagent/keyagent/internal/filesystem"
	"github.com/keyagent/keyagent/internal/image"
	"github.com/keyagent/keyagent/luks"
)

func (o *opening) openImage() (*image.Source, error) {
	return image.Open(o.v.From.Path, image.Proof{SHA256: o.v.From.SHA256, RootHash: o.v.From.RootHash})
}

// imageFits refuses an image that is another, as far as that is seen without reading it,
// or too large, before the key service is told of an attempt to write.
func (o *opening) imageFits(ctx context.Context) error {
	if o.v.From == nil {
		return nil
	}
	s, err := o.openImage()
	if err != nil {
		return err
	}
	defer s.Close()
	size, err := luks.DeviceBytes(ctx, o.v.DevicePath())
	if err != nil {
		return err
	}
	return s.Fits(luks.Room(size, luks.Integrity(o.v.Integrity)))
}

// copyImage fills a volume that is not active yet. A run that is cut off, or that finds
// another image, leaves it so, and the next one begins again.
func (o *opening) copyImage(ctx context.Context) error {
	s, err := o.openImage()
	if err != nil {
		return err
	}
	defer s.Close()
	o.Log.Info("copying the image", "volume", o.v.ID, "from", o.v.From.Path, "bytes", s.Bytes)
	if err := o.step(ctx, "copied", func() error { return s.CopyTo(ctx, o.mapping.Path) }); err != nil {
		return err
	}
	if err := o.holdsFilesystem(ctx); err != nil || o.v.Filesystem == "none" || !filesystem.GrowsUnmounted(o.v.Filesystem) {
		return err
	}
	return o.step(ctx, "grown", func() error { return filesystem.Grow(ctx, o.mapping.Path, "", o.v.Filesystem) })
}

// holdsFilesystem refuses what was copied if the filesystem in it is another one than the
// volume is said to have.
func (o *opening) holdsFilesystem(ctx context.Context) error {
	if o.v.Filesystem == "none" {
		return nil
	}
	found, err := luks.Signatures(ctx, o.mapping.Path)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(found, func(s luks.Signature) bool { return s.Type == o.v.Filesystem }) {
		return failure.Newf(failure.Configuration, "say which filesystem it has, or none", "what was copied holds no %s: %v", o.v.Filesystem, found)
	}
	return filesystem.Suits(o.mapping.Path, o.v.Filesystem)
}

// growCopy makes the filesystem of an image that was just copied, or of a clone, as large
// as its volume, where that needs a mount. The volume is good without it. A clone may have
// been made by a run that was cut off, so that each mount looks.
func (o *opening) growCopy(ctx context.Context, mountPoint string) {
	copied := o.v.From != nil && !filesystem.GrowsUnmounted(o.v.Filesystem)
	if !(o.created && copied) && (o.v.Source == "" || o.mapping.ReadOnly) {
		return
	}
	if err := filesystem.Grow(ctx, o.mapping.Path, mountPoint, o.v.Filesystem); err != nil {
		o.warn(o.e, "filesystem", fmt.Sprintf("the filesystem is as large as what it was copied from, and no larger: keyagent resize %s", o.v.ID))
		o.Log.Warn("the filesystem did not grow to the size of its volume", "volume", o.v.ID, "error", err)
	}
}
