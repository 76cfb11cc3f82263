// Package hardware puts synthetic processors where a guest looks for real ones:
// as the kernel's configfs-tsm, served through FUSE at the very path, so that a
// program under test is the released one and its last hop alone is replaced.
//
// Its tests run the whole of it in a guest with a real dm-crypt.
package hardware

import (
	"context"
	"errors"
	"os"
	"path"
	"sync"
	"syscall"

	"github.com/google/go-configfs-tsm/configfs/configfsi"
	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
)

// TSM is where the kernel has its reports.
const TSM = configfsi.TsmPrefix

// attributes of a report entry, by whether they are written.
var attributes = map[string]bool{
	"inblob": true, "privlevel": true, "service_provider": true, "service_guid": true, "service_manifest_version": true,
	"outblob": false, "auxblob": false, "manifestblob": false, "provider": false, "generation": false, "privlevel_floor": false,
}

// Serve mounts c at dir, until the returned function is called. It needs root.
func Serve(dir string, c configfsi.Client) (unmount func() error, err error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	server, err := fs.Mount(dir, &root{client: c}, &fs.Options{
		MountOptions: fuse.MountOptions{DirectMount: true, DirectMountStrict: true, FsName: "tsm", Name: "tsm"},
	})
	if err != nil {
		return nil, err
	}
	return server.Unmount, nil
}

// root has the one folder of reports.
type root struct {
	fs.Inode
	client configfsi.Client
}

var _ fs.NodeOnAdder = (*root)(nil)

// OnAdd implements fs.NodeOnAdder.
func (r *root) OnAdd(ctx context.Context) {
	r.AddChild("report", r.NewPersistentInode(ctx, &reports{client: r.client}, fs.StableAttr{Mode: syscall.S_IFDIR}), false)
}

// reports is the folder in which a program makes entries.
type reports struct {
	fs.Inode
	client configfsi.Client

	mu      sync.Mutex
	backing map[string]string
}

var (
	_ fs.NodeMkdirer = (*reports)(nil)
	_ fs.NodeRmdirer = (*reports)(nil)
)

// Mkdir implements fs.NodeMkdirer.
func (r *reports) Mkdir(ctx context.Context, name string, _ uint32, _ *fuse.EntryOut) (*fs.Inode, syscall.Errno) {
	p, err := r.client.MkdirTemp(TSM+"/report", name)
	if err != nil {
		return nil, errno(err)
	}
	r.mu.Lock()
	if r.backing == nil {
		r.backing = map[string]string{}
	}
	r.backing[name] = p
	r.mu.Unlock()
	dir := r.NewPersistentInode(ctx, &fs.Inode{}, fs.StableAttr{Mode: syscall.S_IFDIR})
	for attribute := range attributes {
		node := r.NewPersistentInode(ctx, &file{client: r.client, path: path.Join(p, attribute)}, fs.StableAttr{Mode: syscall.S_IFREG})
		dir.AddChild(attribute, node, false)
	}
	return dir, 0
}

// Rmdir implements fs.NodeRmdirer. As in configfs, the attributes go with it.
func (r *reports) Rmdir(_ context.Context, name string) syscall.Errno {
	r.mu.Lock()
	p := r.backing[name]
	delete(r.backing, name)
	r.mu.Unlock()
	return errno(r.client.RemoveAll(p))
}

// file is an attribute: a read asks the hardware, a write is one request.
type file struct {
	fs.Inode
	client configfsi.Client
	path   string
}

var (
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeSetattrer = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
)

// Getattr implements fs.NodeGetattrer.
func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode = 0o600
	return 0
}

// Setattr implements fs.NodeSetattrer: a truncation before a write is nothing.
func (f *file) Setattr(ctx context.Context, h fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return f.Getattr(ctx, h, out)
}

// Open implements fs.NodeOpener.
func (f *file) Open(_ context.Context, flags uint32) (fs.FileHandle, uint32, syscall.Errno) {
	if flags&(syscall.O_WRONLY|syscall.O_RDWR) != 0 {
		return nil, fuse.FOPEN_DIRECT_IO, 0
	}
	data, err := f.client.ReadFile(f.path)
	if err != nil {
		return nil, 0, errno(err)
	}
	return content(data), fuse.FOPEN_DIRECT_IO, 0
}

// Write implements fs.NodeWriter.
func (f *file) Write(_ context.Context, _ fs.FileHandle, data []byte, offset int64) (uint32, syscall.Errno) {
	if offset != 0 {
		return 0, syscall.EINVAL
	}
	if err := f.client.WriteFile(f.path, data); err != nil {
		return 0, errno(err)
	}
	return uint32(len(data)), 0
}

// content is what one open file reads.
type content []byte

var _ fs.FileReader = content(nil)

// Read implements fs.FileReader.
func (c content) Read(_ context.Context, dest []byte, offset int64) (fuse.ReadResult, syscall.Errno) {
	if offset >= int64(len(c)) {
		return fuse.ReadResultData(nil), 0
	}
	return fuse.ReadResultData(c[offset:min(offset+int64(len(dest)), int64(len(c)))]), 0
}

func errno(err error) syscall.Errno {
	var e syscall.Errno
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e
	case errors.Is(err, os.ErrNotExist):
		return syscall.ENOENT
	case errors.Is(err, os.ErrPermission):
		return syscall.EACCES
	}
	return syscall.EIO
}
