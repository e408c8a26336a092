package vault

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/enclave/internal/shield"
)

// failing is a source whose reads start to fail once the header is read.
type failing struct {
	io.ReaderAt
	from int64
	err  error
}

func (f failing) ReadAt(b []byte, at int64) (int, error) {
	if at >= f.from {
		return 0, f.err
	}
	return f.ReaderAt.ReadAt(b, at)
}

func TestSourceThatFailsWhileItIsRead(t *testing.T) {
	for what, readErr := range map[string]error{"become shorter": io.EOF, "reading it failed": errors.New("bad disk")} {
		in, err := openSources(standard.build(t, 1))
		if err != nil {
			t.Fatal(err)
		}
		defer in.close()
		in.files[0].Data = failing{in.files[0].Data, in.files[0].DataOffset + 600, readErr}
		err = writeSample(t, in)
		var invalid *enclave.InvalidError
		if !errors.As(err, &invalid) || !strings.Contains(err.Error(), what) {
			t.Errorf("error %v, want an InvalidError with %q", err, what)
		}
	}
}

func TestSourceThatChangesWhileItIsRead(t *testing.T) {
	from := standard.build(t, 1)
	in, err := openSources(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	f, err := os.OpenFile(from[0], os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprint(f, "more")
	f.Close()
	if err := writeSample(t, in); err == nil || !strings.Contains(err.Error(), "changed while it was read") {
		t.Errorf("error %v", err)
	}
}

func writeSample(t *testing.T, in *sources) error {
	t.Helper()
	plan, err := shield.Read(in.files)
	if err != nil {
		t.Fatal(err)
	}
	out, err := openOutputs(emptyFiles(t, 1), 1)
	if err != nil {
		t.Fatal(err)
	}
	defer out.close()
	d, err := New(Options{}).draw(plan, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.permutation.Wipe()
	_, err = write(t.Context(), plan, d, in, out)
	return err
}

// A head that does not fit into the buffers has to come out as it would have otherwise.
func TestLongHeads(t *testing.T) {
	from := standard.build(t, 1)
	in, err := openSources(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.close()
	plan, err := shield.Read(in.files)
	if err != nil {
		t.Fatal(err)
	}
	d, err := New(Options{}).draw(plan, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer d.permutation.Wipe()
	out, err := openOutputs(emptyFiles(t, 2), 2)
	if err != nil {
		t.Fatal(err)
	}
	defer out.close()
	l := &layout{source: in.files[0]}
	short, long := newWorker(plan, d.permutation), newWorker(plan, d.permutation)
	long.read = long.read[:23] // a row has 64 bytes
	for _, target := range plan.Targets {
		if err := errors.Join(short.tensor(t.Context(), target, l, out[0]), long.tensor(t.Context(), target, l, out[1])); err != nil {
			t.Fatal(err)
		}
	}
	a, _ := os.ReadFile(out[0].Name())
	b, _ := os.ReadFile(out[1].Name())
	if len(a) == 0 || !bytes.Equal(a, b) {
		t.Errorf("%d bytes in whole heads differ from %d in pieces", len(a), len(b))
	}
}
