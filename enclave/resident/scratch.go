package resident

import (
	"fmt"
	"io"
	"unsafe"

	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

const rootBytes = 32

func newRoot(random io.Reader) (*secmem.Region, error) {
	root, err := secmem.New(rootBytes)
	if err != nil {
		return nil, fmt.Errorf("no memory for a key: %w", err)
	}
	if _, err := io.ReadFull(random, root.Bytes()); err != nil {
		root.Wipe()
		return nil, fmt.Errorf("no randomness for a key: %w", err)
	}
	return root, nil
}

// keepScratch is how much of a store's scratch memory stays with it: first touch is what costs time.
const keepScratch = 4 << 20

// secret returns n bytes of secret memory for one call: zero them with done. The caller holds the lock.
func (s *store) secret(n int) ([]byte, error) {
	if s.scratch == nil || len(s.scratch.Bytes()) < n {
		s.giveBack()
		r, err := secmem.New(max(n, 1))
		if err != nil {
			return nil, fmt.Errorf("no memory for keys and values: %w", err)
		}
		s.scratch = r
	}
	return s.scratch.Bytes()[:n], nil
}

// done zeroes what secret returned.
func (s *store) done(b []byte) {
	clear(b)
	if s.scratch != nil && len(s.scratch.Bytes()) > keepScratch {
		s.giveBack()
	}
}

func (s *store) giveBack() {
	if s.scratch != nil {
		s.scratch.Wipe()
		s.scratch = nil
	}
}

// floats views memory that secret returned; it starts at a page.
func floats(b []byte) []float32 {
	return unsafe.Slice((*float32)(unsafe.Pointer(unsafe.SliceData(b))), len(b)/4)
}
