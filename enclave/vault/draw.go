package vault

import (
	"encoding/binary"
	"io"
	"math"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/keys"
	"github.com/kvshield/kvshield/enclave/internal/shield"
)

const (
	// maxPrint is how much of the marker tensor tells models apart.
	maxPrint = 256
	// maxDraws bounds the search for a fingerprint of its own. Only toy models with a head
	// dimension of a few floats ever need a second one.
	maxDraws = 100
)

// drawn is the permutation of a load and what it makes of the marker tensor.
type drawn struct {
	permutation *shield.Permutation
	marker      []byte
	print       string
}

// draw makes a permutation whose fingerprint no other model has, and reserves that.
func (v *Vault) draw(s shield.Shape, own []float32) (*drawn, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for range maxDraws {
		d, err := drawOnce(v.random, s, own)
		if err != nil {
			return nil, err
		}
		if !v.prints[d.print] {
			v.prints[d.print] = true
			return d, nil
		}
		d.permutation.Wipe()
	}
	return nil, enclave.Refuse("no permutation is left that would tell this model from the %d others in the enclave: its head dimension is too small, unload some of them", len(v.prints))
}

func drawOnce(random io.Reader, s shield.Shape, own []float32) (*drawn, error) {
	root, err := keys.New(random)
	if err != nil {
		return nil, err
	}
	defer root.Destroy()
	p, err := shield.Draw(s, root)
	if err != nil {
		return nil, err
	}
	factors, err := p.Factors(own)
	if err != nil {
		p.Wipe()
		return nil, err
	}
	raw := writeFactors(factors)
	return &drawn{p, raw, string(raw[:min(len(raw), maxPrint)])}, nil
}

func readFactors(raw []byte) []float32 {
	list := make([]float32, len(raw)/4)
	for i := range list {
		list[i] = math.Float32frombits(binary.LittleEndian.Uint32(raw[4*i:]))
	}
	return list
}

func writeFactors(list []float32) []byte {
	var raw []byte
	for _, f := range list {
		raw = binary.LittleEndian.AppendUint32(raw, math.Float32bits(f))
	}
	return raw
}
