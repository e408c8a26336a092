// Command benchmodel writes a synthetic Llama-architecture GGUF model for timing.
//
// Run it with -o FILE; without more flags the model has about 1.1 billion parameters in Q8_0. The
// other flags change its shape, so that a test can have a tiny one.
//
// Limits: the weights are noise and so is the text the model writes; only the time it takes means
// anything. Promises: the same flags give the same bytes, and FILE appears complete or not at all.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/kvshield/kvshield/internal/gguf"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stderr)
	switch {
	case err == nil || errors.Is(err, flag.ErrHelp):
	case errors.As(err, new(usageError)):
		fmt.Fprintln(os.Stderr, "benchmodel:", err)
		os.Exit(2)
	default:
		fmt.Fprintln(os.Stderr, "benchmodel:", err)
		os.Exit(1)
	}
}

// usageError is a mistake in the flags.
type usageError struct{ error }

func run(ctx context.Context, args []string, messages io.Writer) error {
	out, m, err := parseFlags(args, messages)
	if err != nil {
		return err
	}
	b, err := m.build()
	if err != nil {
		return usageError{err}
	}
	size, err := b.Size()
	if err != nil {
		return usageError{err}
	}
	fmt.Fprintf(messages, "writing %s: %.2f billion parameters, %d MiB\n", out, float64(m.parameters())/1e9, size>>20)
	return writeFile(out, func(w io.Writer) error {
		_, err := b.WriteTo(&progress{ctx: ctx, w: w, total: size, messages: messages})
		return err
	})
}

func parseFlags(args []string, messages io.Writer) (out string, m model, err error) {
	flags := flag.NewFlagSet("benchmodel", flag.ContinueOnError)
	flags.SetOutput(messages)
	flags.StringVar(&out, "o", "", "file to write (required)")
	flags.Int64Var(&m.layers, "layers", 16, "layers")
	flags.Int64Var(&m.width, "width", 2048, "embedding width")
	flags.Int64Var(&m.heads, "heads", 32, "query heads")
	flags.Int64Var(&m.headsKV, "kv-heads", 8, "key/value heads")
	flags.Int64Var(&m.ffn, "ffn", 8192, "feed-forward width")
	flags.Int64Var(&m.vocab, "vocab", 32000, "tokens in the vocabulary")
	flags.Int64Var(&m.context, "context", 8192, "context length the model names")
	flags.BoolVar(&m.tied, "tied", false, "use the token embeddings as the output weights")
	flags.BoolVar(&m.ropeFreqs, "rope-freqs", false, "include frequency factors as Llama 3 has them")
	flags.Uint64Var(&m.seed, "seed", 1, "seed of the weights")
	kind := flags.String("type", "Q8_0", "type of the weights: F32, F16 or Q8_0")
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return "", m, err
		}
		return "", m, usageError{err}
	}
	if out == "" || flags.NArg() > 0 {
		return "", m, usageError{errors.New("no output file named, or more than flags given: use -o FILE")}
	}
	for _, t := range []gguf.Type{gguf.F32, gguf.F16, gguf.Q8_0} {
		if t.String() == *kind {
			m.kind = t
			return out, m, m.check()
		}
	}
	return "", m, usageError{fmt.Errorf("no weights of type %q: use F32, F16 or Q8_0", *kind)}
}

// writeFile writes beside path and renames at the end.
func writeFile(path string, write func(io.Writer) error) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), ".benchmodel-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			os.Remove(f.Name())
		}
	}()
	if err := write(f); err != nil {
		return err
	}
	if err := f.Chmod(0o644); err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	return os.Rename(f.Name(), path)
}

// progress says every tenth of the way, and stops writing when it is told to.
type progress struct {
	ctx      context.Context
	w        io.Writer
	done     int64
	total    int64
	messages io.Writer
}

func (p *progress) Write(b []byte) (int, error) {
	if p.ctx.Err() != nil {
		return 0, errors.New("interrupted, nothing was written: run it again")
	}
	n, err := p.w.Write(b)
	before := p.tenth()
	p.done += int64(n)
	if after := p.tenth(); after > before {
		fmt.Fprintf(p.messages, "%d %%\n", 10*after)
	}
	return n, err
}

// tenth counts the header too, which the total leaves out.
func (p *progress) tenth() int64 { return min(10, 10*p.done/max(p.total, 1)) }
