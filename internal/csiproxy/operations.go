package csiproxy

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// operations are what is being done to volumes: one at a time for each. Kubelet gives up
// waiting long before a large volume is created, and asks again; what it began goes on,
// and the same question finds it.
type operations struct {
	life    context.Context
	log     *slog.Logger
	mu      sync.Mutex
	running map[string]*operation
}

type operation struct {
	question string
	done     chan struct{}
	answer   any
	err      error

	mu   sync.Mutex
	step string
}

// say tells those who ask what the work is at.
func (o *operation) say(step string) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.step = step
}

func (o *operation) at() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.step
}

// answerBefore is how long before a caller gives up it is told what is being done.
const answerBefore = 2 * time.Second

// do runs f for a volume, or joins the run of the same question. Another question about
// the volume is refused meanwhile, and so is this one shortly before the caller would go
// away; both with the code Aborted, on which the caller asks again.
func do[A any](ctx context.Context, s *operations, volume, question string, f func(context.Context, *operation) (A, error)) (A, error) {
	var none A
	o, mine := s.begin(volume, question)
	if o.question != question {
		return none, status.Errorf(codes.Aborted, "volume %.128q is busy: %s", volume, o.at())
	}
	if mine {
		go func() {
			a, err := f(s.life, o)
			if err != nil { // who asked may be gone
				call, _, _ := strings.Cut(question, " ")
				s.log.Warn("a call failed", "call", call, "volume", fmt.Sprintf("%.128q", volume), "code", status.Code(err), "error", status.Convert(err).Message())
			}
			s.end(volume, o, a, err)
		}()
	}
	timeout, cancel := early(ctx)
	defer cancel()
	select {
	case <-o.done:
	case <-timeout.Done():
		return none, status.Errorf(codes.Aborted, "volume %.128q is being worked on: %s; ask again", volume, o.at())
	}
	a, _ := o.answer.(A)
	return a, o.err
}

// early ends shortly before ctx does.
func early(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok {
		return context.WithCancel(ctx)
	}
	left := time.Until(deadline)
	return context.WithTimeout(ctx, max(left-answerBefore, left/2))
}

func (s *operations) begin(volume, question string) (o *operation, mine bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if o, ok := s.running[volume]; ok {
		return o, false
	}
	o = &operation{question: question, done: make(chan struct{}), step: "begun"}
	s.running[volume] = o
	return o, true
}

func (s *operations) end(volume string, o *operation, answer any, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.running, volume)
	o.answer, o.err = answer, err
	close(o.done)
}
