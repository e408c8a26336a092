package vault

import (
	"testing"

	"github.com/kvshield/kvshield/enclave/internal/shield"
	"github.com/kvshield/kvshield/internal/gguf"
)

// A norm tells loads apart by its last bits, and by nothing more.
func TestMarkedNorm(t *testing.T) {
	norm := writeFactors([]float32{1, 1.5, -0.25, 0, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1})
	v := New(Options{})
	plan := &shield.Plan{InGraph: true, Shape: shield.Shape{Layers: 1, Heads: 2, HeadsKV: 1, KeyDim: 8, ValueDim: 8, RotDim: 8, Rope: shield.RopeNeox, Base: 10000},
		Marker: shield.Marker{Tensor: gguf.Tensor{Name: "blk.0.attn_norm.weight"}}}
	seen := map[string]bool{}
	for range 4 {
		d, err := v.draw(plan, norm)
		if err != nil {
			t.Fatal(err)
		}
		defer d.permutation.Wipe()
		if seen[d.print] || len(d.pairs) != 4 {
			t.Errorf("fingerprint %x, %d pairs", d.print, len(d.pairs))
		}
		seen[d.print] = true
		for i := range norm {
			if changed := d.marker[i] ^ norm[i]; changed > 1 || changed == 1 && i%4 != 0 {
				t.Errorf("byte %d changed by %#x", i, changed)
			}
		}
	}
	if len(seen) != 4 {
		t.Errorf("%d fingerprints of 4 loads", len(seen))
	}
}
