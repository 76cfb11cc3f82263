package gcs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"time"

	"cloud.google.com/go/auth"
	"github.com/googleapis/gax-go/v2"
	"google.golang.org/api/googleapi"

	"github.com/keyagent/keyagent/storage"
)

// errBucketExists: a bucket of that name is there already, ours or not.
var errBucketExists = errors.New("the bucket exists")

// answer is a refusal by the service, without the page around it.
type answer struct {
	status          int
	reason, message string
}

func (a *answer) Error() string {
	return fmt.Sprintf("%d %s: %s", a.status, a.reason, a.message[:min(len(a.message), 500)])
}

// answerOf returns the refusal in an error of the SDK, or nil. The SDK reads the
// reason of most calls, but not of downloads.
func answerOf(err error) *answer {
	var e *googleapi.Error
	if !errors.As(err, &e) {
		return nil
	}
	a := &answer{status: e.Code, message: e.Message}
	items := e.Errors
	if a.message == "" {
		var body struct {
			Error struct {
				Message string
				Errors  []googleapi.ErrorItem
			}
		}
		if json.Unmarshal([]byte(e.Body), &body) == nil {
			a.message, items = body.Error.Message, body.Error.Errors
		} else {
			a.message = e.Body
		}
	}
	if len(items) > 0 {
		a.reason = items[0].Reason
	}
	return a
}

// explain gives an error of the SDK its class. permission is what a refusal
// means.
func (s *Storage) explain(what string, err error, permission string) error {
	class := classOf(err)
	a := answerOf(err)
	if a != nil {
		err = a
	}
	where := fmt.Sprintf("%s bucket %s", what, s.opts.Bucket)
	switch {
	case err == nil:
		return nil
	case class == storage.ErrNotFound, class == storage.ErrConflict:
		return class
	case class == storage.ErrDenied && permission != "":
		return fmt.Errorf("%s: %w: %s: %w", where, class, permission, err)
	case class != nil:
		return fmt.Errorf("%s: %w: %w", where, class, err)
	}
	return fmt.Errorf("%s: %w", where, err)
}

// classOf is the class of an error of the SDK, or nil.
func classOf(err error) error {
	var token *auth.Error
	if errors.As(err, &token) { // no request was sent
		if token.Temporary() {
			return storage.ErrUnavailable
		}
		return storage.ErrCredentials
	}
	a := answerOf(err)
	switch {
	case errors.Is(err, context.Canceled):
		return nil
	case a == nil:
		return storage.ErrUnavailable // also a deadline that has passed
	case a.status == http.StatusNotFound:
		return storage.ErrNotFound // which of the two, the caller finds out
	case a.status == http.StatusPreconditionFailed:
		return storage.ErrConflict
	case a.status == http.StatusConflict:
		return errBucketExists
	case a.status == http.StatusUnauthorized:
		return storage.ErrCredentials
	case a.status == http.StatusTooManyRequests, a.reason == "rateLimitExceeded", a.reason == "userRateLimitExceeded":
		return storage.ErrThrottled
	case a.status == http.StatusForbidden:
		return storage.ErrDenied
	case a.status >= 500, a.status == http.StatusRequestTimeout:
		return storage.ErrUnavailable
	}
	return nil
}

// try calls f until it works, fails for good, or has been tried often enough.
// The SDK tries uploads again, and nothing else.
func (s *Storage) try(ctx context.Context, f func() error) error {
	pause := gax.Backoff{Initial: 250 * time.Millisecond, Max: 5 * time.Second, Multiplier: 2}
	for attempt := 1; ; attempt++ {
		err := f()
		if err == nil || !errors.Is(err, storage.ErrUnavailable) || attempt >= s.opts.Attempts {
			return err
		}
		if ended := gax.Sleep(ctx, pause.Pause()); ended != nil {
			return s.explain("use", errors.Join(ended, err), "")
		}
	}
}
