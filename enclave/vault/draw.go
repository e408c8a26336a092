package vault

import (
	"bytes"
	"encoding/binary"
	"fmt"
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
	pairs       []uint16 // for the engine's graphs; nil when the frequency factors are the marker
}

// draw makes a permutation whose fingerprint no other model has, and reserves that.
func (v *Vault) draw(plan *shield.Plan, own []byte) (*drawn, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	for range maxDraws {
		d, err := drawOnce(v.random, plan, own)
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

func drawOnce(random io.Reader, plan *shield.Plan, own []byte) (*drawn, error) {
	root, err := keys.New(random)
	if err != nil {
		return nil, err
	}
	defer root.Destroy()
	p, err := shield.Draw(plan.Shape, root)
	if err != nil {
		return nil, err
	}
	d := &drawn{permutation: p}
	if plan.InGraph {
		d.pairs = p.Pairs()
		err = d.markWith(random, own)
	} else {
		err = d.factorsInFile(own)
	}
	if err != nil {
		p.Wipe()
		return nil, err
	}
	d.print = string(d.marker[:min(len(d.marker), maxPrint)])
	return d, nil
}

// factorsInFile makes the frequency factors the marker.
func (d *drawn) factorsInFile(own []byte) error {
	var list []float32
	if own != nil {
		list = readFactors(own)
	}
	factors, err := d.permutation.Factors(list)
	d.marker = writeFactors(factors)
	return err
}

// markWith makes the last bits of a norm's first floats random: a change of 1e-7, by which the graphs of this load are told from
// those of any other, the same file loaded again included. The bits are no secret.
func (d *drawn) markWith(random io.Reader, norm []byte) error {
	d.marker = bytes.Clone(norm)
	bits := make([]byte, min(len(norm), maxPrint)/4)
	if _, err := io.ReadFull(random, bits); err != nil {
		return fmt.Errorf("no random bytes: %w", err)
	}
	for i, b := range bits {
		d.marker[4*i] ^= b & 1
	}
	return nil
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
