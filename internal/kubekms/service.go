package kubekms

import (
	"context"
	"fmt"
	"log/slog"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/kms/apis/v2"

	"github.com/keyagent/keyagent/internal/failure"
)

// healthy is the only word that kube-apiserver takes for health.
const healthy = "ok"

// serviceV2 serves v2. What it says of a key_id is what Encrypt uses: both read the
// same snapshots.
type serviceV2 struct {
	v2.UnimplementedKeyManagementServiceServer
	*requests
}

// Status implements the API from the state in memory. Without a KEK it is an error,
// and not an unhealthy answer: that would let kube-apiserver go on writing under the
// key_id in it.
func (s *serviceV2) Status(context.Context, *v2.StatusRequest) (resp *v2.StatusResponse, err error) {
	defer s.done("v2", "status", "", time.Now(), &err)
	h := s.ring.Health()
	if h.KeyID == "" {
		return nil, h.Err
	}
	resp = &v2.StatusResponse{Version: "v2", Healthz: healthy, KeyId: h.KeyID}
	if !h.OK() {
		resp.Healthz = fmt.Sprintf("%s: the key source does not answer (%s)", h.State, failure.Of(h.Err).Class)
	}
	return resp, nil
}

// Encrypt implements the API.
func (s *serviceV2) Encrypt(_ context.Context, r *v2.EncryptRequest) (resp *v2.EncryptResponse, err error) {
	defer s.done("v2", "encrypt", r.GetUid(), time.Now(), &err)
	out, id, err := s.ring.encrypt(purposeV2, r.GetPlaintext())
	if err != nil {
		return nil, err
	}
	return &v2.EncryptResponse{Ciphertext: out, KeyId: id}, nil
}

// Decrypt implements the API. This plugin adds no annotations, and so accepts none.
func (s *serviceV2) Decrypt(_ context.Context, r *v2.DecryptRequest) (resp *v2.DecryptResponse, err error) {
	defer s.done("v2", "decrypt", r.GetUid(), time.Now(), &err)
	switch {
	case len(r.GetKeyId()) == 0 || len(r.GetKeyId()) > MaxKeyID:
		return nil, failure.Newf(failure.Usage, "", "the key_id has %d bytes, allowed are 1 to %d", len(r.GetKeyId()), MaxKeyID)
	case len(r.GetCiphertext()) > MaxCiphertextV2:
		return nil, failure.Newf(failure.Usage, "", "the ciphertext has %d bytes, allowed are %d", len(r.GetCiphertext()), MaxCiphertextV2)
	case len(r.GetAnnotations()) != 0:
		return nil, failure.Newf(failure.Usage, "", "the ciphertext has annotations, which this plugin does not make")
	}
	plain, err := s.ring.decrypt(purposeV2, r.GetCiphertext(), r.GetKeyId())
	if err != nil {
		return nil, err
	}
	return &v2.DecryptResponse{Plaintext: plain}, nil
}

// requests is what both APIs share.
type requests struct {
	ring    *Ring
	log     *slog.Logger
	metrics *Metrics
}

// done logs and counts a request, and turns its error into a status.
func (q *requests) done(api, operation, uid string, began time.Time, err *error) {
	took := time.Since(began)
	q.metrics.request(api, operation, *err, took)
	ctx, level, message := context.Background(), slog.LevelInfo, "answered"
	switch {
	case *err != nil:
		level, message = slog.LevelWarn, "refused"
	case uid == "":
		// kube-apiserver asks for Status each minute, and for all of v1beta1 often.
		level = slog.LevelDebug
	}
	if q.log.Enabled(ctx, level) {
		attrs := []slog.Attr{slog.String("api", api), slog.String("operation", operation), slog.String("uid", bounded(uid)), slog.Duration("took", took)}
		if *err != nil {
			attrs = append(attrs, slog.String("class", class(*err)), slog.Any("error", *err))
		}
		q.log.LogAttrs(ctx, level, message, attrs...)
	}
	if *err == nil {
		return
	}
	*err = toStatus(*err)
}

// bounded keeps what a caller chose from filling the log.
func bounded(s string) string {
	const most = 64
	if len(s) > most {
		return s[:most] + "…"
	}
	return s
}

// toStatus gives a request's error its gRPC code. That a ciphertext does not open has
// one form.
func toStatus(err error) error {
	if failure.Of(err).Class == failure.WrongKey {
		return status.Error(codes.DataLoss, ErrDecrypt.Error())
	}
	return failure.Status(err, err.Error())
}
