package enclave

import (
	"errors"
	"fmt"
)

// CacheID names the keys and values of one layer of one engine context within a [Store]. It is never reused and never zero.
type CacheID uint32

// Storage says how keys and values are kept.
type Storage uint32

const (
	StorageF16  Storage = iota // what a stock engine caches by default
	StorageF32                 // as they come
	StorageQ8_0                // ggml's blocks of 32: half of F16
)

// LayerCache describes one layer of an engine's KV cache.
type LayerCache struct {
	Layer      int     // layer, from 0; for messages
	QueryHeads int     // a multiple of KVHeads
	KVHeads    int     // key/value heads
	DimK, DimV int     // head dimension of keys and of values
	Cells      int     // of one stream
	Streams    int     // a cell is named by stream*Cells + its place in the stream
	Storage    Storage // what the engine's own cache type asks for; the enclave's settings may override it
}

// Reservation is memory set aside for a context's cache.
type Reservation struct {
	First                 CacheID // of the first layer declared; the others follow
	Need, Reserved, Limit int64   // bytes: for this context, for others before it, and the most there may be
}

// MaskType says what the elements of a mask are.
type MaskType uint32

const (
	MaskNone MaskType = iota // every query sees the cells 0 to MaskCells-1 of its stream
	MaskF16
	MaskF32
)

// Batch is what all layers of a graph share: where the tokens' keys and values belong, and who sees what.
type Batch struct {
	Tokens, Blocks int     // tokens of a block lie side by side and belong to one stream; Blocks divides Tokens
	Cells          []int64 // one for each token
	Mask           MaskType
	MaskCells      int    // elements of a row of the mask
	MaskRows       int    // rows of one block, padding included
	MaskData       []byte // Blocks × MaskRows × MaskCells elements, little-endian
}

// Attention is one layer's attention over a batch, or a part of it.
type Attention struct {
	Slot                         int // of the batch
	PutFirst, PutCount           int // the tokens whose keys and values come along
	QueryFirst, QueryCount       int // the tokens whose queries come along
	Scale, MaxBias, LogitSoftcap float32
	K, V, Q, Sinks               []float32 // PutCount×KVHeads×DimK, PutCount×KVHeads×DimV, QueryCount×QueryHeads×DimK, QueryHeads or none
	Out                          []float32 // QueryCount×QueryHeads×DimV
}

// Rotation turns the cached keys by the rotary embedding of a shift in position (a context shift). The parameters are those of
// ggml's ROPE, and so is what they do (ggml/src/ggml-cpu/ops.cpp).
type Rotation struct {
	First                                                  int     // the first cell, stream*Cells + place
	Shift                                                  []int32 // one for each cell from First
	From, Dims                                             int     // the rows of a head that are turned: Dims from From on
	Mode                                                   int32   // ggml's: bit 1 is neox; others are refused
	ContextOrig                                            int32
	Base, Scale, ExtFactor, AttnFactor, BetaFast, BetaSlow float32
	Factors                                                []float32 // Dims/2 frequency factors, or none
	Hadamard                                               int       // the engine caches keys multiplied by this size's Hadamard matrix; 0 for none
}

// Batches is how many batches a [Store] holds at a time.
const Batches = 8

// Store is the KV cache of one engine process, kept in the enclave (mode resident). Every argument comes from that process and is
// not trusted; nothing of the slices is kept. Calls come one at a time.
type Store interface {
	// Declare reserves memory for the layers of a context, all or none; a *MemoryError when they do not fit.
	Declare(layers []LayerCache) (Reservation, error)
	// Release wipes a layer and gives its reservation back.
	Release(id CacheID) error
	// Clear wipes a layer's cells.
	Clear(id CacheID) error
	// Copy makes the cells of a stream those of another.
	Copy(id CacheID, from, to int) error
	// Begin replaces the batch of a slot, 0 to Batches-1. Its mask is copied.
	Begin(slot int, b *Batch) error
	// Attend stores keys and values and computes attention over the cells.
	Attend(id CacheID, a *Attention) error
	// Rotate turns cached keys.
	Rotate(id CacheID, r *Rotation) error
	// Keep wipes those of n cells from first on whose bit in keep (bit i%32 of word i/32) is not set.
	Keep(id CacheID, first, n int, keep []uint32) error
	// Sealer begins a sealed state, Opener reads one.
	Sealer() (Sealer, error)
	Opener(header []byte) (Opener, error)
	// Close wipes everything.
	Close()
}

// SealHeader is the length of a sealed state's header, and SealOverhead what a record is longer than its text, in bytes.
const (
	SealHeader   = 320
	SealOverhead = 32
)

// Sealer encrypts a saved cache record by record: text of the host's, then the cells of each layer. Records are
// authenticated in their order; only the enclave that sealed them can open them, for an engine that has the same models.
type Sealer interface {
	// Header of the state, SealHeader bytes.
	Header() []byte
	// Text appends a record with the host's own bytes to dst.
	Text(dst, text []byte) ([]byte, error)
	// Cells appends a record with keys and values of cells, in the given order.
	Cells(dst []byte, id CacheID, cells []int64) ([]byte, error)
	// End appends the record without which a state is not whole.
	End(dst []byte) ([]byte, error)
}

// Opener opens a sealed state, record by record in their order. Nothing reaches a cache by Check; Place writes.
type Opener interface {
	// Check decrypts a record. It returns the text of a text record, else nil, and whether it was the last one.
	Check(dst, record []byte) (text []byte, end bool, err error)
	// Place writes the keys and values of a record that was checked, by its number from 0, into cells.
	Place(number int, record []byte, id CacheID, cells []int64) error
}

// ErrSealed is a sealed state that this enclave did not make for these models, or that was changed.
var ErrSealed = errors.New("the saved state was sealed by another enclave or for another model, or it was changed")

// ErrCache is a request that does not fit the caches of its store: an unknown layer, a cell outside it, a length that is wrong.
var ErrCache = errors.New("the request does not fit the cache")

// MemoryError is a context that does not fit the enclave's memory.
type MemoryError struct{ Reservation }

func (e *MemoryError) Error() string {
	return fmt.Sprintf("the KV cache of this context needs %d MiB in the enclave, %d MiB of %d MiB are taken; use a smaller context or --enclave-memory",
		(e.Need+1<<20-1)>>20, e.Reserved>>20, e.Limit>>20)
}

// Keeper opens stores, one for each engine process.
type Keeper interface {
	// OpenStore returns an empty store. Models says which models its engine has opened, whenever it is asked.
	OpenStore(models func() []ModelID) Store
}
