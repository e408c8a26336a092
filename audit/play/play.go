// Package play takes the evidence for an audit from real engines: it plays a conversation on a llama-server in each mode,
// takes snapshots of what that caches, and lets the attacks of package audit loose on them.
//
// Start with [Run]. It starts an engine for each mode, one that runs the public model's first layer for the attackers' dictionary, and
// one that runs the public model for those who try tokens.
//
// Limits: Linux; llama-server with shared libraries; models of which the engine runs the first layer alone. Promises: every
// engine is gone and every file removed when Run returns, whatever ended it; slot files, which hold the conversation, are written
// to memory where the machine has a file system there; the conversation is part of the report and of nothing else.
package play

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/adapters/llamacpp"
	"github.com/kvshield/kvshield/audit"
	"github.com/kvshield/kvshield/audit/slotfile"
	"github.com/kvshield/kvshield/internal/gguf"
)

// ModeOff is the stock engine.
const ModeOff = "off"

// Shield is what an engine runs under: a supervisor that allows dumps, and only observes in mode off.
type Shield interface {
	Environment(base []string) []string
	Dump(ctx context.Context, pid int) (*os.File, error)
	Close()
}

// Config of an audit.
type Config struct {
	Model     string // path
	Server    string // path of llama-server
	Args      []string
	Modes     []string
	CacheType string // of keys and values, as llama-server names it; empty: f16
	Talk      Conversation
	// Attacks by key; empty: all.
	Attacks []string
	// NewShield starts what shields a mode, and says what protects it: nothing in mode off.
	NewShield func(mode string) (Shield, string, error)
	// Progress is called before each step, and the function it returns after it. Nil: silent.
	Progress func(what string) (done func())
}

// contextMax is how many tokens a conversation can have.
const contextMax = 4096

type player struct {
	Config
	attacks    []audit.Attack
	info       audit.Model
	shape      slotfile.Shape
	vocabulary int
	context    int
	engine     string
	notes      []string
	publicRows [][]byte // of layer 0's value matrix
	public     *audit.Public
}

// Run audits. When ctx ends it returns ctx's error.
func Run(ctx context.Context, c Config) (*audit.Report, error) {
	p := &player{Config: c}
	if p.Progress == nil {
		p.Progress = func(string) func() { return func() {} }
	}
	if p.CacheType == "" {
		p.CacheType = "f16"
	}
	var err error
	if p.attacks, err = chosen(c.Attacks); err != nil {
		return nil, err
	}
	if err := p.look(); err != nil {
		return nil, err
	}
	r := &audit.Report{Schema: audit.Schema, Created: time.Now().UTC().Truncate(time.Second), Model: p.info, CacheType: p.CacheType, Conversation: c.Talk.Name}
	if err := p.all(ctx, r); err != nil {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, err
	}
	r.Engine = p.engine
	return r, nil
}

// UnknownAttackError names an attack that there is not.
type UnknownAttackError struct{ Key string }

func (e *UnknownAttackError) Error() string {
	var keys []string
	for _, a := range audit.Attacks() {
		keys = append(keys, a.Key)
	}
	return fmt.Sprintf("there is no attack %q; there are %s", e.Key, strings.Join(keys, ", "))
}

func chosen(keys []string) ([]audit.Attack, error) {
	all := audit.Attacks()
	if len(keys) == 0 {
		return all, nil
	}
	var out []audit.Attack
	for _, key := range keys {
		found := false
		for _, a := range all {
			if a.Key == key {
				out, found = append(out, a), true
			}
		}
		if !found {
			return nil, &UnknownAttackError{key}
		}
	}
	return out, nil
}

// look reads the model's shape.
func (p *player) look() error {
	r, f, err := gguf.Open(p.Model)
	if err != nil {
		return err
	}
	defer r.Close()
	arch, _, err := f.Text("general.architecture")
	if err != nil {
		return err
	}
	name, _, _ := f.Text("general.name")
	uint := func(key string) int {
		n, _, _ := f.Uint(arch + "." + key)
		return int(min(n, 1<<30))
	}
	layers, heads := uint("block_count"), uint("attention.head_count")
	headsKV, width := uint("attention.head_count_kv"), uint("embedding_length")
	if headsKV == 0 {
		headsKV = heads
	}
	embd, ok := f.Tensor("token_embd.weight")
	if !ok || layers == 0 || heads == 0 || width == 0 {
		return fmt.Errorf("%s: its header names no layers, heads and token embeddings; the audit knows language models with one head count for all layers", p.Model)
	}
	dim := uint("attention.key_length")
	if dim == 0 {
		dim = width / heads
	}
	p.shape, p.vocabulary = slotfile.Shape{Layers: layers, HeadsKV: headsKV, HeadDim: dim, Sliding: sliding(r, f, arch, layers)}, int(embd.Rows())
	p.info = audit.Model{Name: name, Architecture: arch, Layers: layers, HeadsKV: headsKV, HeadDim: dim, Vocabulary: p.vocabulary}
	p.context = contextMax
	if trained := uint("context_length"); trained > 0 {
		p.context = min(contextMax, trained)
	}
	return nil
}

// all takes the snapshots of all modes before it attacks any: no engine but the attackers' own runs meanwhile.
func (p *player) all(ctx context.Context, r *audit.Report) error {
	var err error
	if p.publicRows, err = publicWeights(p.Model, p.shape); err != nil {
		return err
	}
	done := p.Progress(fmt.Sprintf("computing layer 0 of the public model for %d tokens", p.vocabulary))
	p.public, err = p.dictionary(ctx)
	done()
	if err != nil {
		return err
	}
	var taken []*evidence
	for _, mode := range p.Modes {
		e, err := p.take(ctx, mode)
		if err != nil {
			return fmt.Errorf("mode %s: %w", mode, err)
		}
		taken = append(taken, e)
	}
	own, close, err := p.own(ctx)
	if err != nil {
		return err
	}
	defer close()
	p.public.Start = p.start(ctx, own.client)
	begin := []int32{max(p.public.Start, 0)}
	done = p.Progress("letting the public model write, to see which tokens are frequent")
	p.public.Prior, err = own.prior(ctx, p.vocabulary, begin, p.priorTokens())
	done()
	if err != nil {
		return err
	}
	for _, e := range taken {
		run, err := p.attack(ctx, e, own)
		if err != nil {
			return fmt.Errorf("mode %s: %w", e.mode, err)
		}
		r.Runs = append(r.Runs, *run)
	}
	return nil
}

// priorTokens keeps large models from writing for minutes.
func (p *player) priorTokens() int {
	if st, err := os.Stat(p.Model); err == nil && st.Size() > 256<<20 {
		return priorTokens / 16
	}
	return priorTokens
}

// start is the token that the engine puts before every text, -1 for none.
func (p *player) start(ctx context.Context, c *client) int32 {
	if tokens, err := c.tokenize(ctx, ""); err == nil && len(tokens) > 0 {
		return tokens[0]
	}
	return -1
}

// own starts the attackers' engine.
func (p *player) own(ctx context.Context) (*ownEngine, func(), error) {
	defer p.Progress("starting the attackers' own engine")()
	dir, err := p.scratch()
	if err != nil {
		return nil, nil, err
	}
	c, err := launch(ctx, p.config(os.Environ()), dir)
	if err != nil {
		os.RemoveAll(dir)
		return nil, nil, err
	}
	return &ownEngine{c, p.shape}, func() { c.close(); os.RemoveAll(dir) }, nil
}

func (p *player) config(env []string) llamacpp.ServerConfig {
	args := []string{"-c", fmt.Sprint(p.context), "-fa", "on", "-ctk", p.CacheType, "-ctv", p.CacheType}
	return llamacpp.ServerConfig{Program: p.Server, Model: p.Model, Args: slices.Concat(args, p.allOfIt(), p.Args), Env: env}
}

// allOfIt has layers with a sliding window keep the whole conversation, so that one snapshot has it all.
func (p *player) allOfIt() []string {
	if p.shape.Sliding == nil {
		return nil
	}
	p.note("layers with a sliding window were made to keep the whole conversation (--swa-full), of which they would forget the beginning")
	return []string{"--swa-full"}
}

const tmpfs = 0x01021994

// scratch is a directory for slot files, which hold the conversation: in memory where the machine has room for it there.
func (p *player) scratch() (string, error) {
	const memory, room = "/dev/shm", 256 << 20
	var st unix.Statfs_t
	if unix.Statfs(memory, &st) == nil && st.Type == tmpfs && st.Bavail*uint64(st.Bsize) >= room {
		if dir, err := os.MkdirTemp(memory, "kvshield-audit-"); err == nil {
			return dir, nil
		}
	}
	p.note("slot files, which hold the conversation, were written to " + os.TempDir() + " for the time of the audit: " + memory + " has no room")
	return os.MkdirTemp("", "kvshield-audit-")
}

func (p *player) note(text string) {
	for _, n := range p.notes {
		if n == text {
			return
		}
	}
	p.notes = append(p.notes, text)
}
