// Package tee protects the enclave process and says what protects it.
//
// Call [Select] first, once, early in the life of the enclave process and before any key exists;
// then [Backend.Report] as often as somebody asks. There are two backends:
//
//   - [SGXBackend]: the process runs inside an Intel SGX enclave, started with EGo. It also
//     implements [Sealer]. EGo needs cgo, and so does this package.
//   - [SoftwareBackend]: an ordinary process, hardened with what Linux gives (no core files, not
//     ptraceable, locked memory, Landlock, seccomp). There is no hardware protection, and every
//     report says so.
//
// Limits: the SGX backend has not been run on SGX hardware, only against a substitute for EGo's
// calls. Outside an enclave a hostile kernel can answer EGo's calls itself, so whoever relies on a
// report has to verify its evidence elsewhere (ego/enclave.VerifyRemoteReport) and look at the
// nonce in its first 64 bytes of report data, the signer, the product and the debug flag.
//
// Promises: a backend that was asked for by name is the one that is returned, or an error. Nothing
// is sealed unless a report has succeeded, because outside an enclave EGo seals with a key of zeros
// without an error. What the software backend could not obtain is listed in Report.Missing.
package tee

import (
	"errors"
	"fmt"

	"github.com/kvshield/kvshield/enclave"
)

// Backend says what protects this process. The nonce, at most MaxNonce bytes, is bound into the
// evidence of a hardware backend.
type Backend interface {
	Report(nonce []byte) (enclave.Report, error)
}

// Sealer is implemented by a backend that can encrypt for a later run of the same product on the
// same machine.
type Sealer interface {
	Seal(plain []byte) ([]byte, error)
	Unseal(sealed []byte) ([]byte, error)
}

// MaxNonce is the largest nonce in bytes: what an SGX report holds.
const MaxNonce = 64

// Errors of this package. A caller tells them apart with errors.Is.
var (
	// ErrNoSGX: no report can be had from SGX hardware.
	ErrNoSGX = errors.New("no SGX report can be had: start the enclave with ego on SGX hardware, or choose the software backend")
	// ErrNotAttested: sealing was asked for before a report had succeeded.
	ErrNotAttested = errors.New("refusing to seal, no report has succeeded: ask for a report first")
	// ErrNonce: the nonce does not fit into a report.
	ErrNonce = errors.New("nonce too long: give at most 64 bytes")
	// ErrUnknownBackend: no backend has the name asked for.
	ErrUnknownBackend = errors.New("unknown TEE backend: choose sgx, software or auto")
)

// Select returns the backend of a name: "sgx", "software", or "auto", which is sgx where a report
// can be had and software otherwise. Options only matter to software.
func Select(name string, opt Options) (Backend, error) {
	return selectFrom(ego{}, Software, name, opt)
}

func selectFrom(p platform, software func(Options) (*SoftwareBackend, error), name string, opt Options) (Backend, error) {
	switch name {
	case "sgx":
		return orError(newSGX(p))
	case "software":
		return orError(software(opt))
	case "auto":
		sgx, err := newSGX(p)
		if err == nil {
			return sgx, nil
		}
		b, failed := software(opt)
		if failed != nil {
			return nil, failed
		}
		b.missing = append(b.missing, "sgx: "+err.Error())
		return b, nil
	}
	return nil, fmt.Errorf("%w (%q asked for)", ErrUnknownBackend, name)
}

// orError keeps a nil pointer from becoming a Backend that is not nil.
func orError[B Backend](b B, err error) (Backend, error) {
	if err != nil {
		return nil, err
	}
	return b, nil
}

func checkNonce(nonce []byte) error {
	if len(nonce) > MaxNonce {
		return fmt.Errorf("%w (%d bytes given)", ErrNonce, len(nonce))
	}
	return nil
}
