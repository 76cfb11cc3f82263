// Package awskms is the part of the AWS Key Management Service that keyagent
// uses, for tests: DescribeKey, Encrypt and Decrypt over JSON 1.1, with real
// AES-256-GCM, encryption contexts, aliases, key states, multi-Region replicas,
// attested recipients and signatures that are checked.
package awskms

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/aws/aws-sdk-go-v2/aws"
	v4 "github.com/aws/aws-sdk-go-v2/aws/signer/v4"
)

// Account is whose keys they are.
const Account = "111122223333"

// Service is the service in all of its Regions.
type Service struct {
	// AccessKey and SecretKey are the only ones that it knows.
	AccessKey, SecretKey string
	// PublicKey reads an attestation document. Without it recipients are
	// refused.
	PublicKey func(document []byte) (*rsa.PublicKey, error)

	mu      sync.Mutex
	keys    map[string]*key   // by ID
	aliases map[string]string // from REGION/alias/NAME to an ID
}

// key is a key in the Regions where it is.
type key struct {
	id, usage, spec string
	regions         []string
	states          map[string]string // by Region
	material        [][]byte          // the last one encrypts
}

// New returns a service without keys.
func New(accessKey, secretKey string) *Service {
	return &Service{AccessKey: accessKey, SecretKey: secretKey, keys: map[string]*key{}, aliases: map[string]string{}}
}

// CreateKey makes a symmetric key, and returns its ARN in the first of regions.
// More than one region make it a multi-Region key.
func (s *Service) CreateKey(regions ...string) string {
	return s.CreateKeyOf("ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT", regions...)
}

// CreateKeyOf makes a key of another usage or kind, which cannot encrypt here.
func (s *Service) CreateKeyOf(usage, spec string, regions ...string) string {
	random := hex.EncodeToString(randomBytes(16))
	id := random[:8] + "-" + random[8:12] + "-" + random[12:16] + "-" + random[16:20] + "-" + random[20:]
	if len(regions) > 1 {
		id = "mrk-" + random
	}
	k := &key{id: id, usage: usage, spec: spec, regions: regions, states: map[string]string{}, material: [][]byte{randomBytes(32)}}
	for _, r := range regions {
		k.states[r] = "Enabled"
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.keys[id] = k
	return arnOf(regions[0], id)
}

// SetState puts a key, by its ARN, into a state in that Region.
func (s *Service) SetState(arn, state string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	parts := strings.Split(arn, ":")
	s.keys[idOf(arn)].states[parts[3]] = state
}

// RotateMaterial gives a key new material under its old name.
func (s *Service) RotateMaterial(arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := s.keys[idOf(arn)]
	k.material = append(k.material, randomBytes(32))
}

// SetAlias makes or moves alias/NAME in the Region of a key's ARN.
func (s *Service) SetAlias(alias, arn string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.aliases[strings.Split(arn, ":")[3]+"/"+alias] = idOf(arn)
}

func randomBytes(n int) []byte {
	p := make([]byte, n)
	rand.Read(p)
	return p
}

func arnOf(region, id string) string { return "arn:aws:kms:" + region + ":" + Account + ":key/" + id }

func idOf(arn string) string { return arn[strings.LastIndex(arn, "/")+1:] }

// failure is an error document of the service.
type failure struct {
	status        int
	code, message string
}

func (f *failure) Error() string { return f.code }

func refuse(code, format string, args ...any) error {
	return &failure{http.StatusBadRequest, code, fmt.Sprintf(format, args...)}
}

// request is what the three calls send.
type request struct {
	KeyId               string
	Plaintext           []byte
	CiphertextBlob      []byte
	EncryptionContext   map[string]string
	EncryptionAlgorithm string
	Recipient           *struct {
		AttestationDocument    []byte
		KeyEncryptionAlgorithm string
	}
}

// Region is the endpoint of one Region.
func (s *Service) Region(region string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer, err := s.serve(region, r)
		w.Header().Set("Content-Type", "application/x-amz-json-1.1")
		w.Header().Set("X-Amzn-Requestid", hex.EncodeToString(randomBytes(16)))
		var f *failure
		if errors.As(err, &f) {
			w.WriteHeader(f.status)
			field := "message"
			if f.code == "AccessDeniedException" {
				field = "Message" // as the service spells it there
			}
			answer = map[string]any{"__type": f.code, field: f.message}
		} else if err != nil {
			w.WriteHeader(http.StatusInternalServerError)
			answer = map[string]any{"__type": "KMSInternalException", "message": err.Error()}
		}
		_ = json.NewEncoder(w).Encode(answer) // the client may have gone
	})
}

func (s *Service) serve(region string, r *http.Request) (map[string]any, error) {
	body, err := io.ReadAll(io.LimitReader(r.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if err := s.authenticate(region, r, body); err != nil {
		return nil, err
	}
	if r.Method != http.MethodPost || r.URL.Path != "/" || r.Header.Get("Content-Type") != "application/x-amz-json-1.1" {
		return nil, refuse("UnknownOperationException", "")
	}
	var in request
	d := json.NewDecoder(bytes.NewReader(body))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, refuse("SerializationException", "%v", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch r.Header.Get("X-Amz-Target") {
	case "TrentService.DescribeKey":
		return s.describe(region, &in)
	case "TrentService.Encrypt":
		return s.encrypt(region, &in)
	case "TrentService.Decrypt":
		return s.decrypt(region, &in)
	}
	return nil, refuse("UnknownOperationException", "")
}

// authenticate computes the signature again, over the headers that the client
// says it signed.
func (s *Service) authenticate(region string, r *http.Request, body []byte) error {
	header := r.Header.Get("Authorization")
	fields, ok := strings.CutPrefix(header, "AWS4-HMAC-SHA256 ")
	if !ok {
		return refuse("MissingAuthenticationTokenException", "Missing Authentication Token")
	}
	parts := map[string]string{}
	for p := range strings.SplitSeq(fields, ", ") {
		name, value, _ := strings.Cut(p, "=")
		parts[name] = value
	}
	at, err := time.Parse("20060102T150405Z", r.Header.Get("X-Amz-Date"))
	scope := strings.Split(parts["Credential"], "/")
	if err != nil || len(scope) != 5 || parts["SignedHeaders"] == "" || parts["Signature"] == "" {
		return refuse("IncompleteSignatureException", "Authorization header requires 'Credential', 'SignedHeaders', 'Signature' parameters.")
	}
	switch {
	case scope[0] != s.AccessKey:
		return refuse("UnrecognizedClientException", "The security token included in the request is invalid.")
	case time.Since(at).Abs() > 5*time.Minute:
		return refuse("InvalidSignatureException", "Signature expired")
	case !slices.Equal(scope[1:], []string{at.Format("20060102"), region, "kms", "aws4_request"}):
		return refuse("InvalidSignatureException", "Credential should be scoped to a valid region.")
	}
	again, err := http.NewRequest(r.Method, "http://"+r.Host+r.URL.Path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	for name := range strings.SplitSeq(parts["SignedHeaders"], ";") {
		if name != "host" && name != "content-length" {
			again.Header[http.CanonicalHeaderKey(name)] = r.Header.Values(name)
		}
	}
	sum := sha256.Sum256(body)
	credentials := aws.Credentials{AccessKeyID: s.AccessKey, SecretAccessKey: s.SecretKey}
	if err := v4.NewSigner().SignHTTP(r.Context(), credentials, again, hex.EncodeToString(sum[:]), "kms", region, at); err != nil {
		return err
	}
	if again.Header.Get("Authorization") != header {
		return refuse("InvalidSignatureException", "The request signature we calculated does not match the signature you provided.")
	}
	return nil
}

// find resolves what a request may give as a key's name.
func (s *Service) find(region, name string) (*key, error) {
	id := name
	if rest, isARN := strings.CutPrefix(name, "arn:aws:kms:"+region+":"+Account+":"); isARN {
		id = rest
	}
	if strings.HasPrefix(id, "alias/") {
		id = s.aliases[region+"/"+id]
	}
	k := s.keys[strings.TrimPrefix(id, "key/")]
	if k == nil || !slices.Contains(k.regions, region) {
		return nil, refuse("NotFoundException", "Key '%s' does not exist", name)
	}
	return k, nil
}

func (s *Service) describe(region string, in *request) (map[string]any, error) {
	k, err := s.find(region, in.KeyId)
	if err != nil {
		return nil, err
	}
	return map[string]any{"KeyMetadata": map[string]any{
		"AWSAccountId": Account, "Arn": arnOf(region, k.id), "KeyId": k.id, "CreationDate": 1.7e9, "Description": "",
		"CustomerMasterKeySpec": k.spec, "KeySpec": k.spec, "KeyUsage": k.usage, "KeyManager": "CUSTOMER",
		"KeyState": k.states[region], "Enabled": k.states[region] == "Enabled", "MultiRegion": len(k.regions) > 1,
		"Origin": "AWS_KMS", "EncryptionAlgorithms": []string{"SYMMETRIC_DEFAULT"},
	}}, nil
}

// usable refuses a key whose state or kind does not allow a call.
func (k *key) usable(region string, in *request) error {
	arn := arnOf(region, k.id)
	switch state := k.states[region]; {
	case state == "Disabled":
		return refuse("DisabledException", "%s is disabled.", arn)
	case state == "Unavailable":
		return &failure{http.StatusInternalServerError, "KeyUnavailableException", arn + " is unavailable."}
	case state != "Enabled":
		return refuse("KMSInvalidStateException", "%s is pending deletion.", arn)
	case k.usage != "ENCRYPT_DECRYPT" || k.spec != "SYMMETRIC_DEFAULT":
		return refuse("InvalidKeyUsageException", "%s key usage is %s which is not valid for this call.", arn, k.usage)
	case in.EncryptionAlgorithm != "" && in.EncryptionAlgorithm != "SYMMETRIC_DEFAULT":
		return refuse("InvalidKeyUsageException", "this algorithm is not valid for %s", arn)
	}
	return nil
}

// associated is the encryption context in an order of its own.
func associated(context map[string]string) []byte {
	var out []byte
	for _, name := range slices.Sorted(maps.Keys(context)) {
		out = fmt.Appendf(out, "%d:%s%d:%s", len(name), name, len(context[name]), context[name])
	}
	return out
}

func aead(key []byte) cipher.AEAD {
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err) // the length is right
	}
	a, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err)
	}
	return a
}

func (s *Service) encrypt(region string, in *request) (map[string]any, error) {
	k, err := s.find(region, in.KeyId)
	if err != nil {
		return nil, err
	}
	if err := k.usable(region, in); err != nil {
		return nil, err
	}
	if len(in.Plaintext) < 1 || len(in.Plaintext) > 4096 {
		return nil, refuse("ValidationException", "1 validation error detected: Value at 'plaintext' failed to satisfy constraint")
	}
	blob := []byte{byte(len(k.id))}
	blob = append(blob, k.id...)
	blob = append(blob, byte(len(k.material)-1))
	blob = aead(k.material[len(k.material)-1]).Seal(blob, nil, in.Plaintext, associated(in.EncryptionContext))
	return map[string]any{"CiphertextBlob": blob, "KeyId": arnOf(region, k.id), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}, nil
}

func (s *Service) decrypt(region string, in *request) (map[string]any, error) {
	invalid := refuse("InvalidCiphertextException", "")
	blob := in.CiphertextBlob
	if len(blob) < 1 || len(blob) > 6144 {
		return nil, refuse("ValidationException", "1 validation error detected: Value at 'ciphertextBlob' failed to satisfy constraint")
	}
	n := int(blob[0])
	if len(blob) < n+2 {
		return nil, invalid
	}
	made, ok := s.keys[string(blob[1:1+n])]
	if !ok || !slices.Contains(made.regions, region) || int(blob[1+n]) >= len(made.material) {
		return nil, invalid
	}
	if in.KeyId != "" {
		asked, err := s.find(region, in.KeyId)
		if err != nil {
			return nil, err
		}
		if asked != made {
			return nil, refuse("IncorrectKeyException", "The key ID in the request does not identify a CMK that can perform this operation.")
		}
	}
	if err := made.usable(region, in); err != nil {
		return nil, err
	}
	plain, err := aead(made.material[blob[1+n]]).Open(nil, nil, blob[n+2:], associated(in.EncryptionContext))
	if err != nil {
		return nil, invalid
	}
	answer := map[string]any{"KeyId": arnOf(region, made.id), "EncryptionAlgorithm": "SYMMETRIC_DEFAULT"}
	if in.Recipient == nil {
		answer["Plaintext"] = plain
		return answer, nil
	}
	if s.PublicKey == nil || in.Recipient.KeyEncryptionAlgorithm != "RSAES_OAEP_SHA_256" {
		return nil, refuse("ValidationException", "The attestation document cannot be parsed.")
	}
	public, err := s.PublicKey(in.Recipient.AttestationDocument)
	if err != nil {
		return nil, refuse("ValidationException", "The attestation document cannot be parsed.")
	}
	answer["CiphertextForRecipient"], err = Envelop(public, plain)
	return answer, err
}
