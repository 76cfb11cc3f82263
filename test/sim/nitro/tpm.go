package nitro

import (
	"bytes"
	"crypto"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"fmt"
	"time"

	"github.com/fxamacker/cbor/v2"
	"github.com/google/go-tpm/tpm2"
)

// TPM knows the commands that a document is asked for with, and checks their
// authorisation. It is used by one goroutine.
type TPM struct {
	Authority *Authority
	// Answer, if set, replaces the answer to a request.
	Answer func(nonce []byte) []byte
	// Code, if set, is what the vendor command ends with.
	Code tpm2.TPMRC
	// Plain hides the vendor command: it is some other maker's TPM.
	Plain bool

	index    uint32 // 0: not defined
	password []byte
	nv       []byte
	written  bool

	key      *rsa.PrivateKey
	sessions map[uint32]*session
	next     uint32
	loaded   int
}

type session struct{ key, caller, tpm []byte }

// NewTPM returns the TPM of an instance.
func NewTPM(a *Authority) (*TPM, error) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	return &TPM{Authority: a, key: key, sessions: map[uint32]*session{}, next: 0x02000000}, err
}

// LeaveBehind defines the index, as a process does that died.
func (t *TPM) LeaveBehind(index uint32) {
	t.index, t.nv, t.password = index, make([]byte, 16), []byte{1}
}

// Left is what nobody gave back: the index, keys and sessions.
func (t *TPM) Left() (index uint32, keys, sessions int) { return t.index, t.loaded, len(t.sessions) }

// Close implements transport.TPMCloser.
func (t *TPM) Close() error { return nil }

// Send implements transport.TPM.
func (t *TPM) Send(command []byte) (rsp []byte, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("command is not understood: %v", p)
		}
	}()
	r := &reader{command[10:]}
	hasSessions := binary.BigEndian.Uint16(command) == uint16(tpm2.TPMSTSessions)
	cc := tpm2.TPMCC(binary.BigEndian.Uint32(command[6:]))
	body, auth, code := t.run(cc, r, hasSessions)
	if code != tpm2.TPMRCSuccess {
		return response(tpm2.TPMSTNoSessions, code, nil), nil
	}
	if !hasSessions {
		return response(tpm2.TPMSTNoSessions, 0, body), nil
	}
	out := append([]byte{}, body[:auth.handles]...)
	parms := body[auth.handles:]
	out = binary.BigEndian.AppendUint32(out, uint32(len(parms)))
	out = append(out, parms...)
	return response(tpm2.TPMSTSessions, 0, append(out, auth.answer(cc, parms)...)), nil
}

func response(tag tpm2.TPMST, code tpm2.TPMRC, body []byte) []byte {
	out := binary.BigEndian.AppendUint16(nil, uint16(tag))
	out = binary.BigEndian.AppendUint32(out, uint32(10+len(body)))
	return append(binary.BigEndian.AppendUint32(out, uint32(code)), body...)
}

// auths is the authorisation area of one command.
type auths struct {
	t       *TPM
	handles int // bytes of handles in the response
	used    []used
}

type used struct {
	handle   uint32
	session  *session
	attrs    byte
	password []byte // counts for the session's HMAC
}

// check reads the area and checks it against the command's names and parameters.
// The first session has the password, further ones have none.
func (t *TPM) check(cc tpm2.TPMCC, r *reader, password []byte, names ...[]byte) (*auths, bool) {
	area := &reader{r.take(int(r.u32()))}
	a := &auths{t: t}
	ok := true
	for first := true; len(area.b) > 0; first = false {
		u := used{handle: area.u32()}
		nonce := area.sized()
		u.attrs = area.take(1)[0]
		mac := area.sized()
		if first {
			u.password = password
		}
		if u.handle == uint32(tpm2.TPMRSPW) {
			ok = ok && bytes.Equal(mac, u.password)
			a.used = append(a.used, u)
			continue
		}
		if u.session = t.sessions[u.handle]; u.session == nil {
			return a, false
		}
		u.session.caller = nonce
		h := sha512.New()
		h.Write(binary.BigEndian.AppendUint32(nil, uint32(cc)))
		for _, n := range names {
			h.Write(n)
		}
		h.Write(r.b)
		want := sum(append(bytes.Clone(u.session.key), u.password...), h.Sum(nil), u.session.caller, u.session.tpm, []byte{u.attrs})
		ok = ok && hmac.Equal(mac, want)
		if u.attrs&(1<<5) != 0 {
			size := int(binary.BigEndian.Uint16(r.b))
			stream(u.session, r.b[2:2+size])
		}
		a.used = append(a.used, u)
	}
	return a, ok
}

// stream decrypts a parameter: part 1, section 21.3.
func stream(s *session, b []byte) {
	kiv := tpm2.KDFa(crypto.SHA512, s.key, "CFB", s.caller, s.tpm, 256)
	block, err := aes.NewCipher(kiv[:16])
	if err != nil {
		panic(err)
	}
	//lint:ignore SA1019 TPMs have no other mode.
	cipher.NewCFBDecrypter(block, kiv[16:]).XORKeyStream(b, b)
}

func (a *auths) answer(cc tpm2.TPMCC, parms []byte) []byte {
	var out []byte
	h := sha512.New()
	h.Write(make([]byte, 4))
	h.Write(binary.BigEndian.AppendUint32(nil, uint32(cc)))
	h.Write(parms)
	rp := h.Sum(nil)
	for _, u := range a.used {
		if u.session == nil {
			out = append(out, 0, 0, 1, 0, 0) // continueSession
			continue
		}
		u.session.tpm = random(64)
		mac := sum(append(bytes.Clone(u.session.key), u.password...), rp, u.session.tpm, u.session.caller, []byte{u.attrs})
		out = append(append(out, sized(u.session.tpm)...), u.attrs)
		out = append(out, sized(mac)...)
		if u.attrs&1 == 0 {
			delete(a.t.sessions, u.handle)
		}
	}
	return out
}

func sum(key []byte, parts ...[]byte) []byte {
	m := hmac.New(sha512.New, key)
	for _, p := range parts {
		m.Write(p)
	}
	return m.Sum(nil)
}

func (t *TPM) public() tpm2.TPMSNVPublic {
	return tpm2.TPMSNVPublic{NVIndex: tpm2.TPMHandle(t.index), NameAlg: tpm2.TPMAlgSHA512, DataSize: uint16(len(t.nv)),
		Attributes: tpm2.TPMANV{AuthRead: true, AuthWrite: true, Written: t.written}}
}

func (t *TPM) name() []byte {
	digest := sha512.Sum512(tpm2.Marshal(t.public()))
	return append([]byte{0x00, 0x0D}, digest[:]...)
}

func handleName(h tpm2.TPMHandle) []byte { return binary.BigEndian.AppendUint32(nil, uint32(h)) }

func (t *TPM) run(cc tpm2.TPMCC, r *reader, sessions bool) ([]byte, *auths, tpm2.TPMRC) {
	switch cc {
	case tpm2.TPMCCGetCapability:
		body := []byte{0, 0, 0, 0, 2, 0, 0, 0, 0}
		if !t.Plain {
			body = []byte{0, 0, 0, 0, 2, 0, 0, 0, 1, 0x24, 0x40, 0x00, 0x01} // vendor, two handles, writes NV
		}
		return body, nil, 0
	case tpm2.TPMCCCreatePrimary:
		r.u32()
		a, ok := t.check(cc, r, nil, handleName(tpm2.TPMRHEndorsement))
		if !ok {
			return nil, nil, tpm2.TPMRCAuthFail
		}
		t.loaded++
		public := tpm2.RSAEKTemplate
		public.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgRSA, &tpm2.TPM2BPublicKeyRSA{Buffer: t.key.N.Bytes()})
		marshalled := tpm2.Marshal(public)
		digest := sha256.Sum256(marshalled)
		a.handles = 4
		body := append([]byte{0x80, 0, 0, 0}, sized(marshalled)...)
		body = append(body, sized(nil)...)                                            // creation data
		body = append(body, sized(nil)...)                                            // its hash
		body = append(body, 0x80, 0x21, 0x40, 0, 0, 0x0B, 0, 0)                       // ticket
		return append(body, sized(append([]byte{0x00, 0x0B}, digest[:]...))...), a, 0 // name
	case tpm2.TPMCCFlushContext:
		if h := r.u32(); h>>24 == 0x80 {
			t.loaded--
		} else {
			delete(t.sessions, h)
		}
		return nil, nil, 0
	case tpm2.TPMCCStartAuthSession:
		r.take(8)
		caller, secret := r.sized(), r.sized()
		salt, err := rsa.DecryptOAEP(sha256.New(), nil, t.key, secret, []byte("SECRET\x00"))
		if err != nil {
			return nil, nil, tpm2.TPMRCValue
		}
		s := &session{caller: caller, tpm: random(64)}
		s.key = tpm2.KDFa(crypto.SHA512, salt, "ATH", s.tpm, s.caller, 512)
		t.next++
		t.sessions[t.next] = s
		return append(binary.BigEndian.AppendUint32(nil, t.next), sized(s.tpm)...), nil, 0
	case tpm2.TPMCCNVDefineSpace:
		r.u32()
		a, ok := t.check(cc, r, nil, handleName(tpm2.TPMRHOwner))
		if !ok {
			return nil, nil, tpm2.TPMRCAuthFail
		}
		if t.index != 0 {
			for _, u := range a.used { // as sessions end that were to be used once
				delete(t.sessions, u.handle)
			}
			return nil, nil, tpm2.TPMRCNVDefined
		}
		t.password = bytes.Clone(r.sized())
		public, err := tpm2.Unmarshal[tpm2.TPMSNVPublic](r.sized())
		if err != nil || public.NameAlg != tpm2.TPMAlgSHA512 {
			return nil, nil, tpm2.TPMRCValue
		}
		t.index, t.nv, t.written = uint32(public.NVIndex), bytes.Repeat([]byte{0xFF}, int(public.DataSize)), false
		return nil, a, 0
	case tpm2.TPMCCNVReadPublic:
		if t.index == 0 || r.u32() != t.index {
			return nil, nil, tpm2.TPMRCHandle
		}
		return append(sized(tpm2.Marshal(t.public())), sized(t.name())...), nil, 0
	case tpm2.TPMCCNVUndefineSpace:
		r.take(8)
		a, ok := t.check(cc, r, nil, handleName(tpm2.TPMRHOwner), t.name())
		if !ok {
			return nil, nil, tpm2.TPMRCAuthFail
		}
		t.index, t.nv = 0, nil
		return nil, a, 0
	case tpm2.TPMCCNVWrite, tpm2.TPMCCNVRead, 0x20000001:
		if by, on := r.u32(), r.u32(); by != t.index || on != t.index || !sessions {
			return nil, nil, tpm2.TPMRCHandle
		}
		a, ok := t.check(cc, r, t.password, t.name(), t.name())
		if !ok {
			return nil, nil, tpm2.TPMRCAuthFail
		}
		return t.message(cc, r, a)
	}
	return nil, nil, tpm2.TPMRCCommandCode
}

func (t *TPM) message(cc tpm2.TPMCC, r *reader, a *auths) ([]byte, *auths, tpm2.TPMRC) {
	switch cc {
	case tpm2.TPMCCNVWrite:
		data := r.sized()
		copy(t.nv[r.u16():], data)
		t.written = true
		return nil, a, 0
	case tpm2.TPMCCNVRead:
		size, offset := int(r.u16()), int(r.u16())
		return sized(t.nv[offset : offset+size]), a, 0
	}
	if t.Code != 0 {
		return nil, nil, t.Code
	}
	var request map[string]map[string][]byte
	if _, err := cbor.UnmarshalFirst(t.nv, &request); err != nil || len(request["Attestation"]) != 3 {
		return nil, nil, tpm2.TPMRCValue
	}
	nonce := request["Attestation"]["nonce"]
	if t.Answer != nil {
		copy(t.nv, t.Answer(nonce))
		return nil, a, 0
	}
	document, err := t.Authority.Document(time.Now(), nonce)
	if err != nil {
		return nil, nil, tpm2.TPMRCFailure
	}
	answer, err := cbor.Marshal(map[string]any{"Attestation": map[string]any{"document": document}})
	if err != nil {
		return nil, nil, tpm2.TPMRCFailure
	}
	copy(t.nv, answer)
	return nil, a, 0
}

// reader takes a command apart. What is short panics, which Send recovers.
type reader struct{ b []byte }

func (r *reader) take(n int) []byte { out := r.b[:n]; r.b = r.b[n:]; return out }
func (r *reader) u16() uint16       { return binary.BigEndian.Uint16(r.take(2)) }
func (r *reader) u32() uint32       { return binary.BigEndian.Uint32(r.take(4)) }
func (r *reader) sized() []byte     { return r.take(int(r.u16())) }

func sized(b []byte) []byte { return append(binary.BigEndian.AppendUint16(nil, uint16(len(b))), b...) }

func random(n int) []byte { b := make([]byte, n); rand.Read(b); return b }
