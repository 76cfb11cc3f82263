package tpm

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"google.golang.org/protobuf/proto"

	attestv1 "github.com/keyagent/keyagent/api/keyagent/attest/v1"
	"github.com/keyagent/keyagent/attestation"
	"github.com/keyagent/keyagent/internal/secret"
	"github.com/keyagent/keyagent/internal/wire"
)

// DefaultEventLog is where the kernel shows the firmware's event log. It needs
// securityfs.
const DefaultEventLog = "/sys/kernel/security/tpm0/binary_bios_measurements"

// IssuerOptions configure [NewIssuer]. Unset fields take the stated default.
type IssuerOptions struct {
	// Device is passed to OpenDevice. Default DefaultDevice.
	Device string
	// EK chooses the endorsement key. Default EKAuto.
	EK EKType
	// AK chooses the attestation key. Default AKAuto.
	AK AKType
	// EKPin, if set, is the only endorsement key that is accepted, as EKDigest
	// gives it: a TPM that somebody put on the bus instead is refused.
	EKPin string
	// EventLog is the path of the event log. Default DefaultEventLog. A file
	// that does not exist is left out; the verifier's policy decides.
	EventLog string
	// EKIntermediates and AKIntermediates may stand between this machine's certificates
	// and a root. Those that do are sent.
	EKIntermediates, AKIntermediates []*x509.Certificate
	// Log hears of keys and certificates that are there and of no use. Default: it goes
	// unheard.
	Log func(msg string, err error)
	// Shared is for a machine that many peers ask at a time, some of which never ask
	// in the end. The offer is made once, and the TPM is taken for answers alone.
	Shared bool
	// UserspaceLog is the path of systemd's own log. Default DefaultUserspaceLog. It
	// is left out where it does not exist.
	UserspaceLog string
}

// Issuer makes evidence with the TPM of this machine. The TPM is opened for
// each exchange, so that other users of a raw device get their turn.
type Issuer struct {
	opts IssuerOptions
	turn chan struct{} // a raw device has three slots for keys: one exchange at a time

	mu    sync.Mutex
	offer *prepared // if the issuer is shared, and has made one
}

// prepared is an offer, with what an answer to it needs.
type prepared struct {
	data   []byte
	akCert []byte
}

var _ attestation.Issuer = (*Issuer)(nil)

// NewIssuer returns an issuer. It does not touch the TPM.
func NewIssuer(opts IssuerOptions) (*Issuer, error) {
	if opts.Device == "" {
		opts.Device = DefaultDevice
	}
	if opts.EK == "" {
		opts.EK = EKAuto
	}
	if opts.AK == "" {
		opts.AK = AKAuto
	}
	if opts.EventLog == "" {
		opts.EventLog = DefaultEventLog
	}
	if opts.UserspaceLog == "" {
		opts.UserspaceLog = DefaultUserspaceLog
	}
	if !slices.Contains([]AKType{AKAuto, AKOwn, AKCloud}, opts.AK) {
		return nil, fmt.Errorf("unknown attestation key type %q (hint: auto, own or cloud)", opts.AK)
	}
	if opts.EKPin != "" && opts.AK == AKAuto {
		opts.AK = AKOwn // a pin is for an EK, so there has to be one
	}
	if opts.EKPin != "" && opts.AK == AKCloud {
		return nil, errors.New("an endorsement key is pinned, but a cloud's attestation key has none (hint: ak: own)")
	}
	if opts.EK != EKAuto && !slices.ContainsFunc(eks, func(e ek) bool { return e.kind == opts.EK }) {
		return nil, fmt.Errorf("unknown endorsement key type %q (hint: auto, rsa-2048 or ecc-p384)", opts.EK)
	}
	return &Issuer{opts: opts, turn: make(chan struct{}, 1)}, nil
}

func (i *Issuer) log(msg string, err error) {
	if i.opts.Log != nil {
		i.opts.Log(msg, err)
	}
}

// Kind implements attestation.Issuer.
func (*Issuer) Kind() attestation.Kind { return attestation.TPM }

// Begin implements attestation.Issuer: it reads the EK certificate, makes the
// AK, and leaves both keys loaded until the Attempt is closed. A shared issuer
// unloads them as soon as it has its offer.
func (i *Issuer) Begin(ctx context.Context) (attestation.Attempt, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if i.opts.Shared {
		i.mu.Lock()
		known := i.offer
		i.mu.Unlock()
		if known != nil {
			return &attempt{issuer: i, offer: known.data, akCert: known.akCert}, nil
		}
	}
	a := &attempt{issuer: i}
	offer, err := a.take(ctx)
	if err != nil {
		return nil, err
	}
	a.offer = offer
	if i.opts.Shared {
		if err := a.Close(); err != nil {
			return nil, err
		}
		i.mu.Lock()
		i.offer = &prepared{a.offer, a.akCert}
		i.mu.Unlock()
	}
	return a, nil
}

// EK names the endorsement key that this machine offers, as [EKDigest] does.
func (i *Issuer) EK(ctx context.Context) (string, error) {
	a := &attempt{issuer: i}
	if _, err := a.take(ctx); err != nil {
		return "", err
	}
	pub, err := tpm2.Pub(a.ekey.public)
	if err == nil && a.akCert != nil {
		err = errors.New("the TPM offers a cloud's attestation key, which has no endorsement key")
	}
	var digest string
	if err == nil {
		digest, err = EKDigest(pub)
	}
	return digest, errors.Join(err, a.Close())
}

// take waits for the TPM, loads the keys and returns the offer of them.
func (a *attempt) take(ctx context.Context) (_ []byte, err error) {
	select {
	case a.issuer.turn <- struct{}{}:
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for the TPM, which another exchange has: %w", ctx.Err())
	}
	a.taken = true
	defer func() {
		if err != nil {
			a.Close()
		}
	}()
	if a.tpm, err = OpenDevice(a.issuer.opts.Device); err != nil {
		return nil, err
	}
	if err := a.chooseKeys(); err != nil {
		return nil, err
	}
	if a.clock, err = readClock(a.tpm); err != nil {
		return nil, err
	}
	offer := &attestv1.TPMOffer{AkPublic: tpm2.Marshal(a.ak.public)}
	if a.akCert != nil {
		offer.AkCertificate, offer.AkIntermediates = a.akCert, a.intermediates
	} else {
		offer.EkCertificate, offer.EkIntermediates, offer.EkPublic = a.cert, a.intermediates, tpm2.Marshal(a.ekey.public)
	}
	return proto.Marshal(offer)
}

// retake takes the TPM for the answer to an offer that was made before.
func (a *attempt) retake(ctx context.Context) error {
	offer, err := a.take(ctx)
	if err != nil {
		return err
	}
	if !bytes.Equal(offer, a.offer) {
		a.issuer.mu.Lock()
		a.issuer.offer = nil
		a.issuer.mu.Unlock()
		return errors.Join(errOtherKeys, a.Close())
	}
	return nil
}

var errOtherKeys = errors.New("the TPM has other keys than it had (hint: it was cleared, or is another one; the next exchange offers them)")

// chooseKeys takes the AK that the cloud certified, or else an EK and an AK of
// our own.
func (a *attempt) chooseKeys() (err error) {
	if a.issuer.opts.AK != AKOwn {
		var cert *x509.Certificate
		if a.ak, cert, err = loadCloudAK(a.tpm); err != nil {
			return err
		}
		if cert != nil {
			a.akCert, a.intermediates = cert.Raw, chainFrom(cert, a.issuer.opts.AKIntermediates)
			return nil
		}
		if a.issuer.opts.AK == AKCloud {
			return fmt.Errorf("%w: no cloud put a certified attestation key into this TPM (hint: ak: own)", attestation.ErrNoDevice)
		}
	}
	if err := a.chooseEK(); err != nil {
		return err
	}
	if a.ak, err = createPrimary(a.tpm, akTemplate); err != nil {
		return fmt.Errorf("make the attestation key: %w", err)
	}
	return nil
}

type attempt struct {
	issuer *Issuer
	tpm    transport.TPMCloser
	ek     ek
	ekey   object
	ak     object
	cert   []byte // of the EK
	akCert []byte // of the AK, which then needs no EK
	// intermediates lead from whichever of the two is offered towards a root.
	intermediates [][]byte
	offer         []byte
	clock         tpm2.TPMSClockInfo
	taken         bool
}

// Offer implements attestation.Attempt.
func (a *attempt) Offer() []byte { return a.offer }

// Evidence implements attestation.Attempt.
func (a *attempt) Evidence(ctx context.Context, ask []byte, binder attestation.Binder) ([]byte, error) {
	var q attestv1.TPMAsk
	if err := wire.Unmarshal(ask, &q); err != nil {
		return nil, fmt.Errorf("verifier's question: %w", err)
	}
	if q.GetBank() != uint32(tpm2.TPMAlgSHA256) || len(q.GetPcrs()) == 0 {
		return nil, fmt.Errorf("verifier asks for bank %#x and %d PCRs, only SHA-256 and at least one are answered", q.GetBank(), len(q.GetPcrs()))
	}
	for i, p := range q.GetPcrs() {
		if p > 23 || (i > 0 && p <= q.GetPcrs()[i-1]) {
			return nil, fmt.Errorf("verifier asks for PCRs %v", q.GetPcrs())
		}
	}
	if a.tpm == nil {
		if err := a.retake(ctx); err != nil {
			return nil, err
		}
		defer a.Close()
	}
	var proof []byte
	if a.akCert == nil {
		var err error
		if proof, err = a.activate(&q, binder); err != nil {
			return nil, err
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	ev, err := a.quote(&q, binder)
	if err != nil {
		return nil, err
	}
	ev.CredentialProof = proof
	if q.GetWantEventLog() {
		if err := addLogs(ev, a.issuer.opts.EventLog, a.issuer.opts.UserspaceLog); err != nil {
			return nil, err
		}
	}
	return proto.Marshal(ev)
}

// activate recovers the verifier's secret and proves it. The session is salted
// to the EK and encrypts the response, so that the secret does not cross the
// bus in the clear.
func (a *attempt) activate(q *attestv1.TPMAsk, binder attestation.Binder) ([]byte, error) {
	rsp, err := tpm2.ActivateCredential{
		ActivateHandle: tpm2.AuthHandle{Handle: a.ak.handle, Name: a.ak.name, Auth: tpm2.PasswordAuth(nil)},
		KeyHandle: tpm2.AuthHandle{Handle: a.ekey.handle, Name: a.ekey.name,
			Auth: a.ek.auth(a.ekey.handle, a.ekey.public)},
		CredentialBlob: tpm2.TPM2BIDObject{Buffer: q.GetCredentialBlob()},
		Secret:         tpm2.TPM2BEncryptedSecret{Buffer: q.GetEncryptedSecret()},
	}.Execute(a.tpm)
	if err != nil {
		return nil, fmt.Errorf("activate the verifier's credential: %w", err)
	}
	defer secret.Wipe(rsp.CertInfo.Buffer)
	return credentialProof(rsp.CertInfo.Buffer, binder), nil
}

// credentialProof shows that the attester recovered the secret, for this
// binder only.
func credentialProof(credential []byte, binder attestation.Binder) []byte {
	m := hmac.New(sha256.New, credential)
	m.Write(binder[:])
	return m.Sum(nil)
}

func (a *attempt) quote(q *attestv1.TPMAsk, binder attestation.Binder) (*attestv1.TPMEvidence, error) {
	return quote(a.tpm, a.ak, a.clock, q.GetPcrs(), binder)
}

// maxQuotes bounds how often a quote is made again because something was measured
// between it and the reading of the values that it covers.
const maxQuotes = 5

// quote signs with ak, and refuses to go on if the TPM was reset since clock was
// read. A boot goes on measuring meanwhile: values that the quote does not cover are not
// evidence of anything wrong, and both are made again.
func quote(t transport.TPM, ak object, clock tpm2.TPMSClockInfo, pcrs []uint32, binder attestation.Binder) (*attestv1.TPMEvidence, error) {
	for n := 1; ; n++ {
		ev, covered, err := quoteOnce(t, ak, clock, pcrs, binder)
		if err != nil || covered || n == maxQuotes {
			return ev, err
		}
	}
}

// quoteOnce also reports whether the quote covers the values.
func quoteOnce(t transport.TPM, ak object, clock tpm2.TPMSClockInfo, pcrs []uint32, binder attestation.Binder) (ev *attestv1.TPMEvidence, covered bool, err error) {
	qualifying := sha256.Sum256(binder[:])
	rsp, err := tpm2.Quote{
		SignHandle:     tpm2.AuthHandle{Handle: ak.handle, Name: ak.name, Auth: tpm2.PasswordAuth(nil)},
		QualifyingData: tpm2.TPM2BData{Buffer: qualifying[:]},
		InScheme:       tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:      selection(pcrs),
	}.Execute(t)
	if err != nil {
		return nil, false, fmt.Errorf("quote: %w", err)
	}
	attest, err := rsp.Quoted.Contents()
	if err != nil {
		return nil, false, err
	}
	if c := attest.ClockInfo; ak.clear && (c.ResetCount != clock.ResetCount || c.RestartCount != clock.RestartCount) {
		return nil, false, fmt.Errorf("%w: reset count %d then %d, restart count %d then %d", ErrReset,
			clock.ResetCount, c.ResetCount, clock.RestartCount, c.RestartCount)
	}
	values, err := readPCRs(t, pcrs)
	if err != nil {
		return nil, false, err
	}
	info, err := attest.Attested.Quote()
	if err != nil {
		return nil, false, err
	}
	digest := sha256.Sum256(slices.Concat(values...))
	return &attestv1.TPMEvidence{
		Attest:    rsp.Quoted.Bytes(),
		Signature: tpm2.Marshal(rsp.Signature),
		PcrValues: values,
	}, bytes.Equal(digest[:], info.PCRDigest.Buffer), nil
}

// Close implements attestation.Attempt.
func (a *attempt) Close() error {
	if !a.taken {
		return nil
	}
	defer func() { a.taken = false; <-a.issuer.turn }()
	if a.tpm == nil {
		return nil
	}
	a.ak.flush(a.tpm)
	a.ekey.flush(a.tpm)
	err := a.tpm.Close()
	a.tpm = nil
	return err
}

func readClock(t transport.TPM) (tpm2.TPMSClockInfo, error) {
	rsp, err := tpm2.ReadClock{}.Execute(t)
	if err != nil {
		return tpm2.TPMSClockInfo{}, fmt.Errorf("read the TPM's clock: %w", err)
	}
	return rsp.CurrentTime.ClockInfo, nil
}

// readPCRs reads SHA-256 values in the order of pcrs. A TPM returns at most
// eight values a command.
func readPCRs(t transport.TPM, pcrs []uint32) ([][]byte, error) {
	values := make([][]byte, 0, len(pcrs))
	for part := range slices.Chunk(pcrs, 8) {
		rsp, err := tpm2.PCRRead{PCRSelectionIn: selection(part)}.Execute(t)
		if err != nil {
			return nil, fmt.Errorf("read PCRs: %w", err)
		}
		if len(rsp.PCRValues.Digests) != len(part) {
			return nil, fmt.Errorf("read PCRs %v: the TPM has %d of them in its SHA-256 bank (hint: enable the bank in the firmware's setup)", part, len(rsp.PCRValues.Digests))
		}
		for _, d := range rsp.PCRValues.Digests {
			values = append(values, bytes.Clone(d.Buffer))
		}
	}
	return values, nil
}

// addLogs reads the logs behind the quote: what is measured in between is in them,
// and not in the quote, and a verifier knows that.
func addLogs(ev *attestv1.TPMEvidence, firmware, user string) (err error) {
	if ev.EventLog, err = readEventLog(firmware); err != nil || ev.EventLog == nil {
		return err
	}
	ev.UserspaceLog, err = readUserspaceLog(user)
	return err
}

func readEventLog(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	defer f.Close()
	log, err := io.ReadAll(io.LimitReader(f, MaxEventLog+1))
	if err != nil {
		return nil, fmt.Errorf("event log: %w", err)
	}
	if len(log) > MaxEventLog {
		return nil, fmt.Errorf("event log %s is larger than %d bytes", path, MaxEventLog)
	}
	return log, nil
}
