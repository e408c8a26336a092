package tee

import (
	"fmt"
	"sync/atomic"

	"github.com/kvshield/kvshield/enclave"
)

const (
	sgxStatement   = "sgx backend: the processor keeps the enclave's memory from the host"
	debugStatement = "sgx backend in debug mode: no hardware protection; the host can read the keys"
)

// SGXBackend is an enclave built and started with EGo. It has not been run on SGX hardware.
type SGXBackend struct {
	platform platform
	debug    bool
	attested atomic.Bool
}

var (
	_ Backend = (*SGXBackend)(nil)
	_ Sealer  = (*SGXBackend)(nil)
)

// SGX returns the SGX backend once a first report has succeeded, and ErrNoSGX otherwise.
func SGX() (*SGXBackend, error) { return newSGX(ego{}) }

func newSGX(p platform) (*SGXBackend, error) {
	b := &SGXBackend{platform: p}
	if _, err := b.evidence(nil); err != nil {
		return nil, err
	}
	debug, err := p.debug()
	if err != nil {
		return nil, fmt.Errorf("asking whether the enclave is in debug mode failed: %w (%w)", ErrNoSGX, err)
	}
	b.debug = debug
	return b, nil
}

// Report returns evidence whose report data is the nonce, padded with zeros to 64 bytes.
func (b *SGXBackend) Report(nonce []byte) (enclave.Report, error) {
	evidence, err := b.evidence(nonce)
	if err != nil {
		return enclave.Report{}, err
	}
	report := enclave.Report{Backend: "sgx", Hardware: true, Statement: sgxStatement, Evidence: evidence}
	if b.debug {
		report.Hardware, report.Statement = false, debugStatement
		report.Missing = []string{"protected memory: this is a debug enclave, build it with debug off"}
	}
	return report, nil
}

func (b *SGXBackend) evidence(nonce []byte) ([]byte, error) {
	if err := checkNonce(nonce); err != nil {
		return nil, err
	}
	var reportData [MaxNonce]byte
	copy(reportData[:], nonce)
	evidence, err := b.platform.remoteReport(reportData[:])
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", ErrNoSGX, err)
	}
	if len(evidence) == 0 {
		return nil, fmt.Errorf("%w (the report is empty)", ErrNoSGX)
	}
	b.attested.Store(true)
	return evidence, nil
}

// Seal encrypts with the product's key: a later version of this enclave by the same signer can
// unseal it on this machine. It returns ErrNotAttested unless a report has succeeded.
func (b *SGXBackend) Seal(plain []byte) ([]byte, error) {
	if !b.attested.Load() {
		return nil, ErrNotAttested
	}
	return b.platform.seal(plain)
}

// Unseal decrypts what Seal returned, under the same condition.
func (b *SGXBackend) Unseal(sealed []byte) ([]byte, error) {
	if !b.attested.Load() {
		return nil, ErrNotAttested
	}
	return b.platform.unseal(sealed)
}
