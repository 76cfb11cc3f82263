package kubekms

//lint:file-ignore SA1019 v1beta1 is deprecated as a whole, and clusters of 2018 speak it.

import (
	"context"
	"time"

	"google.golang.org/grpc"
	"k8s.io/kms/apis/v1beta1"

	"github.com/keyagent/keyagent/internal/failure"
)

// registerV1 adds v1beta1 to a server, and returns its name.
func registerV1(s *grpc.Server, q *requests, version string) string {
	v1beta1.RegisterKeyManagementServiceServer(s, &serviceV1{requests: q, version: version})
	return v1beta1.KeyManagementService_ServiceDesc.ServiceName
}

// serviceV1 serves v1beta1, which knows neither key_id nor UID.
type serviceV1 struct {
	v1beta1.UnimplementedKeyManagementServiceServer
	*requests
	version string
}

const apiV1 = "v1beta1"

// Version implements the API.
func (s *serviceV1) Version(context.Context, *v1beta1.VersionRequest) (resp *v1beta1.VersionResponse, err error) {
	defer s.done(apiV1, "version", "", time.Now(), &err)
	return &v1beta1.VersionResponse{Version: apiV1, RuntimeName: "keyagent", RuntimeVersion: s.version}, nil
}

// Encrypt implements the API.
func (s *serviceV1) Encrypt(_ context.Context, r *v1beta1.EncryptRequest) (resp *v1beta1.EncryptResponse, err error) {
	defer s.done(apiV1, "encrypt", "", time.Now(), &err)
	out, _, err := s.ring.encrypt(purposeV1, r.GetPlain())
	if err != nil {
		return nil, err
	}
	return &v1beta1.EncryptResponse{Cipher: out}, nil
}

// Decrypt implements the API.
func (s *serviceV1) Decrypt(_ context.Context, r *v1beta1.DecryptRequest) (resp *v1beta1.DecryptResponse, err error) {
	defer s.done(apiV1, "decrypt", "", time.Now(), &err)
	if len(r.GetCipher()) > MaxCiphertextV1 {
		return nil, failure.Newf(failure.Usage, "", "the ciphertext has %d bytes, allowed are %d", len(r.GetCipher()), MaxCiphertextV1)
	}
	plain, err := s.ring.decrypt(purposeV1, r.GetCipher(), "")
	if err != nil {
		return nil, err
	}
	return &v1beta1.DecryptResponse{Plain: plain}, nil
}
