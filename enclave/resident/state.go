package resident

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/secmem"
)

// A sealed state is a header and records. Numbers are little-endian.
//
//	header: 8 "KVSEALED", 4 version, 4 number of models, 16 id, 32 digest of each model, zeros up to 320
//	record: 4 kind, 4 length of the text, 8 zeros, the text encrypted, 16 tag
//	text of a cells record: 4 storage, 4 KV heads, 4 dimension of keys, 4 of values, 4 number of cells, then the cells
//	text of the end record: 8 number of records before it
//
// Each state has a key of its own, derived from the process's root key and the whole header, so a record counts in its own
// state only. Cipher: AES-256-GCM; nonce: the record's number, from 0; additional data: the record's first 16 bytes and its number.
const (
	magic        = "KVSEALED"
	version      = 1
	maxModels    = 8
	digestBytes  = sha256.Size
	idAt         = 16
	digestsAt    = 32
	recordHeader = 16
	tagBytes     = enclave.SealOverhead - recordHeader
	maxText      = secmem.MaxSize - enclave.SealOverhead
	cellsHeader  = 20
)

type recordKind uint32

const (
	recordText recordKind = iota + 1
	recordCells
	recordEnd
)

// state is what sealing and opening have in common.
type state struct {
	s      *store
	header [enclave.SealHeader]byte
	aead   cipher.AEAD
}

// derive makes the key of the state from its header.
func (st *state) derive() error {
	r := st.s.r
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return errClosed
	}
	info := "kvshield/v1/sealed-state/" + string(st.header[:])
	key, err := hkdf.Key(sha256.New, r.root.Bytes(), st.header[idAt:digestsAt], info, 32)
	if err != nil {
		return fmt.Errorf("no key for a saved state: %w", err)
	}
	defer clear(key)
	block, err := aes.NewCipher(key)
	if err != nil {
		return fmt.Errorf("no cipher for a saved state: %w", err)
	}
	st.aead, err = cipher.NewGCM(block)
	return err
}

// seal encrypts n bytes at the start of buf, which has room for the tag behind them, and appends the record to dst. It does so in
// the enclave's own memory: the tag must be one of what was encrypted, not of what an engine put there meanwhile.
func (st *state) seal(dst []byte, kind recordKind, number uint64, buf []byte, n int) []byte {
	var head [recordHeader]byte
	binary.LittleEndian.PutUint32(head[0:], uint32(kind))
	binary.LittleEndian.PutUint32(head[4:], uint32(n))
	sealed := st.aead.Seal(buf[:0], nonce(number), buf[:n], additional(head, number))
	return append(append(dst, head[:]...), sealed...)
}

// open decrypts a record into secret memory, which the caller gives back with done. The record is copied first.
func (st *state) open(record []byte, number uint64) (kind recordKind, buf, text []byte, err error) {
	if len(record) < enclave.SealOverhead || len(record) > enclave.SealOverhead+maxText {
		return 0, nil, nil, enclave.ErrSealed
	}
	head := [recordHeader]byte(record)
	if int64(binary.LittleEndian.Uint32(head[4:])) != int64(len(record)-enclave.SealOverhead) {
		return 0, nil, nil, enclave.ErrSealed
	}
	buf, err = st.s.secret(len(record) - recordHeader)
	if err != nil {
		return 0, nil, nil, err
	}
	copy(buf, record[recordHeader:])
	text, err = st.aead.Open(buf[:0], nonce(number), buf, additional(head, number))
	if err != nil {
		st.s.done(buf)
		return 0, nil, nil, enclave.ErrSealed
	}
	return recordKind(binary.LittleEndian.Uint32(head[:])), buf, text, nil
}

func nonce(number uint64) []byte {
	return binary.LittleEndian.AppendUint64(make([]byte, 4, 12), number)
}

func additional(head [recordHeader]byte, number uint64) []byte {
	return binary.LittleEndian.AppendUint64(head[:], number)
}

// digests returns those of the models that the store's engine has opened, sorted, none twice, and whether all are known.
func (s *store) digests() (list [][digestBytes]byte, all bool) {
	all = true
	for _, id := range s.models() {
		var d [digestBytes]byte
		known := false
		if s.r.digest != nil {
			d, known = s.r.digest(id)
		}
		if known {
			list = append(list, d)
		}
		all = all && known
	}
	slices.SortFunc(list, func(a, b [digestBytes]byte) int { return bytes.Compare(a[:], b[:]) })
	return slices.Compact(list), all
}

// newHeader writes a header with a fresh id.
func (s *store) newHeader(to *[enclave.SealHeader]byte) error {
	models, all := s.digests()
	if !all || len(models) < 1 || len(models) > maxModels {
		return fmt.Errorf("the state cannot be sealed for %d models, all of them known: %t; an engine with 1 to %d models can save", len(models), all, maxModels)
	}
	copy(to[:], magic)
	binary.LittleEndian.PutUint32(to[8:], version)
	binary.LittleEndian.PutUint32(to[12:], uint32(len(models)))
	for i, d := range models {
		copy(to[digestsAt+i*digestBytes:], d[:])
	}
	s.r.mu.Lock()
	defer s.r.mu.Unlock()
	if _, err := io.ReadFull(s.r.random, to[idAt:digestsAt]); err != nil {
		return fmt.Errorf("no randomness for a saved state: %w", err)
	}
	return nil
}

// accepts says whether a header is one for models that the store's engine has open.
func (s *store) accepts(h []byte) bool {
	n := binary.LittleEndian.Uint32(h[12:])
	if string(h[:len(magic)]) != magic || binary.LittleEndian.Uint32(h[8:]) != version || n < 1 || n > maxModels {
		return false
	}
	models, _ := s.digests()
	for i := range int(n) {
		if !slices.Contains(models, [digestBytes]byte(h[digestsAt+i*digestBytes:])) {
			return false
		}
	}
	return true
}
