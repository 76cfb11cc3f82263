// Package gcpkms is the part of Google's Cloud Key Management Service that
// keyagent uses, for tests: GetCryptoKey, Encrypt and Decrypt of the official API
// over gRPC, with real AES-256-GCM, additional authenticated data, versions with
// states, and checksums that are checked and given.
package gcpkms

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/kms/apiv1/kmspb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

// Service is the service. Its zero value has no keys.
type Service struct {
	kmspb.UnimplementedKeyManagementServiceServer

	mu     sync.Mutex
	keys   map[string]*key
	damage func(message any)
}

type key struct {
	purpose  kmspb.CryptoKey_CryptoKeyPurpose
	primary  int // index of the version that encrypts
	versions []version
}

type version struct {
	state    kmspb.CryptoKeyVersion_CryptoKeyVersionState
	material []byte
}

// Start serves on loopback, without TLS, until the test ends, and returns the URL.
func (s *Service) Start(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	kmspb.RegisterKeyManagementServiceServer(server, s)
	done := make(chan error, 1)
	go func() { done <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "http://" + l.Addr().String()
}

// CreateKey makes a key with one version, by its full name.
func (s *Service) CreateKey(name string, purpose kmspb.CryptoKey_CryptoKeyPurpose) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.keys == nil {
		s.keys = map[string]*key{}
	}
	s.keys[name] = &key{purpose: purpose, versions: []version{newVersion()}}
}

func newVersion() version {
	material := make([]byte, 32)
	rand.Read(material)
	return version{kmspb.CryptoKeyVersion_ENABLED, material}
}

// Rotate gives a key a new primary version.
func (s *Service) Rotate(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[name]
	k.versions = append(k.versions, newVersion())
	k.primary = len(k.versions) - 1
}

// SetState puts a version, counted from 1, into a state.
func (s *Service) SetState(name string, number int, state kmspb.CryptoKeyVersion_CryptoKeyVersionState) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[name].versions[number-1].state = state
}

// Damage has f change each request before it is looked at, and each answer before
// it is sent.
func (s *Service) Damage(f func(message any)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.damage = f
}

func (s *Service) broken(message any) {
	if s.damage != nil {
		s.damage(message)
	}
}

func (s *Service) find(name string) (*key, error) {
	k := s.keys[name]
	if k == nil {
		return nil, status.Errorf(codes.NotFound, "CryptoKey %s not found.", name)
	}
	return k, nil
}

func versionName(name string, index int) string {
	return name + "/cryptoKeyVersions/" + strconv.Itoa(index+1)
}

// GetCryptoKey describes a key and its primary version.
func (s *Service) GetCryptoKey(_ context.Context, in *kmspb.GetCryptoKeyRequest) (*kmspb.CryptoKey, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k, err := s.find(in.GetName())
	if err != nil {
		return nil, err
	}
	out := &kmspb.CryptoKey{Name: in.GetName(), Purpose: k.purpose}
	if k.purpose == kmspb.CryptoKey_ENCRYPT_DECRYPT {
		out.Primary = &kmspb.CryptoKeyVersion{
			Name: versionName(in.GetName(), k.primary), State: k.versions[k.primary].state,
			Algorithm: kmspb.CryptoKeyVersion_GOOGLE_SYMMETRIC_ENCRYPTION, ProtectionLevel: kmspb.ProtectionLevel_SOFTWARE,
		}
	}
	s.broken(out)
	return out, nil
}

func checksum(p []byte) int64 { return int64(crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli))) }

// verify checks a checksum that a client may have sent, and says whether it did.
func verify(field string, p []byte, sum *wrapperspb.Int64Value) (bool, error) {
	if sum == nil {
		return false, nil
	}
	if sum.GetValue() != checksum(p) {
		return false, status.Errorf(codes.InvalidArgument, "The checksum in field %s_crc32c did not match the data in field %s.", field, field)
	}
	return true, nil
}

func (v version) usable(name string) error {
	if v.state != kmspb.CryptoKeyVersion_ENABLED {
		return status.Errorf(codes.FailedPrecondition, "%s is not enabled, current state is: %s.", name, v.state)
	}
	return nil
}

func (v version) aead() cipher.AEAD {
	block, err := aes.NewCipher(v.material)
	if err != nil {
		panic(err) // the length is right
	}
	a, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return a
}

// Encrypt encrypts under the primary version. The ciphertext begins with the
// version's number.
func (s *Service) Encrypt(_ context.Context, in *kmspb.EncryptRequest) (*kmspb.EncryptResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken(in)
	k, err := s.find(in.GetName())
	if err != nil {
		return nil, err
	}
	plain, err := verify("plaintext", in.GetPlaintext(), in.GetPlaintextCrc32C())
	if err != nil {
		return nil, err
	}
	data, err := verify("additional_authenticated_data", in.GetAdditionalAuthenticatedData(), in.GetAdditionalAuthenticatedDataCrc32C())
	if err != nil {
		return nil, err
	}
	name := versionName(in.GetName(), k.primary)
	if k.purpose != kmspb.CryptoKey_ENCRYPT_DECRYPT {
		return nil, status.Errorf(codes.FailedPrecondition, "%s is not enabled for ENCRYPT.", name)
	}
	v := k.versions[k.primary]
	if err := v.usable(name); err != nil {
		return nil, err
	}
	ciphertext := v.aead().Seal(binary.BigEndian.AppendUint32(nil, uint32(k.primary)), nil, in.GetPlaintext(), in.GetAdditionalAuthenticatedData())
	out := &kmspb.EncryptResponse{
		Name: name, Ciphertext: ciphertext, CiphertextCrc32C: wrapperspb.Int64(checksum(ciphertext)),
		VerifiedPlaintextCrc32C: plain, VerifiedAdditionalAuthenticatedDataCrc32C: data, ProtectionLevel: kmspb.ProtectionLevel_SOFTWARE,
	}
	s.broken(out)
	return out, nil
}

// Decrypt finds the version itself.
func (s *Service) Decrypt(_ context.Context, in *kmspb.DecryptRequest) (*kmspb.DecryptResponse, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broken(in)
	if strings.Contains(in.GetName(), "/cryptoKeyVersions/") {
		return nil, status.Error(codes.InvalidArgument, "The request names a version, not a CryptoKey.")
	}
	k, err := s.find(in.GetName())
	if err != nil {
		return nil, err
	}
	if _, err := verify("ciphertext", in.GetCiphertext(), in.GetCiphertextCrc32C()); err != nil {
		return nil, err
	}
	if _, err := verify("additional_authenticated_data", in.GetAdditionalAuthenticatedData(), in.GetAdditionalAuthenticatedDataCrc32C()); err != nil {
		return nil, err
	}
	invalid := status.Error(codes.InvalidArgument, "Decryption failed: the ciphertext is invalid.")
	if len(in.GetCiphertext()) < 4 {
		return nil, invalid
	}
	index := int(binary.BigEndian.Uint32(in.GetCiphertext()))
	if index >= len(k.versions) {
		return nil, invalid
	}
	v := k.versions[index]
	if err := v.usable(versionName(in.GetName(), index)); err != nil {
		return nil, err
	}
	plain, err := v.aead().Open(nil, nil, in.GetCiphertext()[4:], in.GetAdditionalAuthenticatedData())
	if err != nil {
		return nil, invalid
	}
	out := &kmspb.DecryptResponse{
		Plaintext: plain, PlaintextCrc32C: wrapperspb.Int64(checksum(plain)),
		UsedPrimary: index == k.primary, ProtectionLevel: kmspb.ProtectionLevel_SOFTWARE,
	}
	s.broken(out)
	return out, nil
}

// KeyName is the full name of a key.
func KeyName(project, location, ring, key string) string {
	return fmt.Sprintf("projects/%s/locations/%s/keyRings/%s/cryptoKeys/%s", project, location, ring, key)
}
