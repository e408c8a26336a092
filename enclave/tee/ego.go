package tee

import (
	"github.com/edgelesssys/ego/ecrypto"
	ego_enclave "github.com/edgelesssys/ego/enclave"
)

// platform is what this package asks of EGo.
type platform interface {
	// remoteReport returns evidence over reportData, which must not be empty: EGo takes the
	// address of its first byte.
	remoteReport(reportData []byte) ([]byte, error)
	// debug says whether the host may read this enclave's memory.
	debug() (bool, error)
	seal(plain []byte) ([]byte, error)
	unseal(sealed []byte) ([]byte, error)
}

// sealedFor keeps what another program of the same signer and product sealed from being taken
// for ours. It is not a secret.
var sealedFor = []byte("kvshield enclave 1")

// ego is the real platform. Outside an enclave its seal succeeds with a key of zeros.
type ego struct{}

var _ platform = ego{}

func (ego) remoteReport(reportData []byte) ([]byte, error) {
	return ego_enclave.GetRemoteReport(reportData)
}

func (ego) debug() (bool, error) {
	self, err := ego_enclave.GetSelfReport()
	return self.Debug, err
}

func (ego) seal(plain []byte) ([]byte, error) {
	return ecrypto.SealWithProductKey(plain, sealedFor)
}

func (ego) unseal(sealed []byte) ([]byte, error) {
	return ecrypto.Unseal(sealed, sealedFor)
}
