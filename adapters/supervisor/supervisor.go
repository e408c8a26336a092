// Package supervisor is the host side of a shielded run: it owns the session socket, keeps an enclave process alive,
// hands each engine process its data plane and its shielded models.
//
// Start with [New]; give the child processes [Supervisor.Environment]; end with [Supervisor.Close]. It holds no key: keys stay in
// the enclave process. When the enclave dies, every engine process that used it is ended, because its models
// cannot be inverted any more, and a new enclave is started for those that come later.
package supervisor

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/plugin"
)

// Config of a supervisor.
type Config struct {
	Hook      string            // path of libkvshield.so; empty where the engines have the hook linked in
	Enclave   string            // path of the enclave's program
	Args      []string          // arguments of the enclave's program, before the runtime directory's
	Transport session.Transport // of the data plane; zero: shared memory
	Capacity  uint32            // payload bytes of a frame; zero: a default for the mode
	Spin      time.Duration     // how long each end spins before it sleeps
	Timeout   time.Duration     // how long an engine waits for the enclave before it ends; zero: 10 s
	Directory string            // where the runtime directory is made; empty: chosen
	Program   string            // what is run, for the status
	Log       *slog.Logger
	// Audit lets [Supervisor.Dump] read the engines' memory through their hooks. With Observe nothing is shielded either: no
	// enclave is started, and the engines run as stock ones. For package audit; nothing else sets them.
	Audit, Observe bool
	// Resident keeps KV caches in the enclave, whose program must have been told so by Args. Scrub has what they were made
	// from wiped in the engine.
	Resident, Scrub bool
	// Allowed says of a model, by its full path, that its user allows it to run in the clear. Nil: no model.
	Allowed func(path string) bool
	// Ended is called when a hook ends its process, with the reason; may be nil.
	Ended func(pid int, reason string)
	// EnclaveLost is called when the enclave died, after the engines were told to end; EnclaveBack when another
	// one answers. Either may be nil.
	EnclaveLost, EnclaveBack func()
}

const killAfter = time.Second

// Supervisor of one shielded run.
type Supervisor struct {
	cfg    Config
	dir    *RuntimeDir
	hook   string
	server *session.Server
	stop   context.CancelFunc
	ctx    context.Context
	wg     sync.WaitGroup

	mu      sync.Mutex
	enclave *plugin.Client // nil while there is none
	engines map[*session.Peer]*engine
	counted counted
	events  Events
	report  enclave.Report

	status sync.Mutex // one writer of the status file at a time
}

// Events is what happened in a run, for its last words.
type Events struct {
	Shielded int      // models shielded, each once however often its process opened it
	Clear    int      // models in the clear, as their user allows
	Passed   int      // files without attention weights, opened as they are
	Refusals []string // why models were refused, the first 100
	Fatal    []string // why hooks ended their processes, the first 100
}

// maxNotes of a kind are kept: engine processes are not trusted with our memory.
const maxNotes = 100

func note(list []string, text string) []string {
	if len(list) < maxNotes {
		list = append(list, text)
	}
	return list
}

// New starts an enclave and opens the session socket.
func New(ctx context.Context, cfg Config) (*Supervisor, error) {
	if cfg.Transport == 0 {
		cfg.Transport = session.SharedMemory
	}
	if cfg.Capacity == 0 {
		cfg.Capacity = dataplane.DefaultCapacity
		if cfg.Resident {
			cfg.Capacity = dataplane.ResidentCapacity
		}
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 10 * time.Second
	}
	if cfg.Observe && !cfg.Audit {
		return nil, errors.New("a run that is not shielded can be observed only in an audit")
	}
	if _, err := os.Stat(cfg.Hook); cfg.Hook != "" && err != nil {
		return nil, fmt.Errorf("the hook library %s is missing; build it with `make build`, or name it with --hook", cfg.Hook)
	}
	dir, err := NewRuntimeDir(cfg.Directory)
	if err != nil {
		return nil, err
	}
	s := &Supervisor{cfg: cfg, dir: dir, engines: map[*session.Peer]*engine{}}
	s.ctx, s.stop = context.WithCancel(ctx)
	if err := s.begin(); err != nil {
		s.stop()
		dir.Remove()
		return nil, err
	}
	return s, nil
}

func (s *Supervisor) begin() error {
	if err := s.placeHook(); err != nil {
		return err
	}
	var err error
	if !s.cfg.Observe {
		if s.enclave, err = plugin.Start(s.enclaveOptions()); err != nil {
			return err
		}
	}
	if s.server, err = session.Listen(s.dir.Path("session.sock"), s); err != nil {
		if s.enclave != nil {
			s.enclave.Close()
		}
		return err
	}
	s.attestOnce()
	s.wg.Go(s.keepEnclave)
	s.wg.Go(func() {
		if err := s.server.Serve(s.ctx); err != nil {
			s.cfg.Log.Error("session socket failed", "error", err)
		}
	})
	return nil
}

// placeHook gives the hook a name without spaces and colons, which separate names in LD_PRELOAD.
func (s *Supervisor) placeHook() error {
	if s.cfg.Hook == "" {
		return nil
	}
	absolute, err := filepath.Abs(s.cfg.Hook)
	if err != nil {
		return err
	}
	s.hook = s.dir.Path("libkvshield.so")
	return os.Symlink(absolute, s.hook)
}

func (s *Supervisor) enclaveOptions() plugin.Options {
	return plugin.Options{Program: s.cfg.Enclave, Args: append(slices.Clone(s.cfg.Args), "--runtime-dir", s.dir.Root()), SocketDir: s.dir.Root()}
}

// Environment is what a child process needs to be shielded, on top of the given environment.
func (s *Supervisor) Environment(base []string) []string {
	preload := s.hook
	var env []string
	for _, e := range base {
		switch {
		case strings.HasPrefix(e, "KVSHIELD_SOCKET="):
		case strings.HasPrefix(e, "LD_PRELOAD="):
			if old := strings.TrimPrefix(e, "LD_PRELOAD="); old != "" {
				preload += ":" + old
			}
		default:
			env = append(env, e)
		}
	}
	return append(env, "LD_PRELOAD="+preload, "KVSHIELD_SOCKET="+s.server.Path)
}

// Socket is the path that KVSHIELD_SOCKET has to name.
func (s *Supervisor) Socket() string { return s.server.Path }

// Hook is the base name under which the hook library is seen in a process.
func (s *Supervisor) Hook() string { return filepath.Base(s.cfg.Hook) }

// RuntimeDir is where this run keeps its sockets.
func (s *Supervisor) RuntimeDir() *RuntimeDir { return s.dir }

var (
	errNoEnclave = errors.New("the enclave is restarting; try again in a moment")
	errObserved  = errors.New("this run only observes and has no enclave")
)

func (s *Supervisor) client() (*plugin.Client, error) {
	if s.cfg.Observe {
		return nil, errObserved
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.enclave == nil {
		return nil, errNoEnclave
	}
	return s.enclave, nil
}

const (
	enclaveWithin = 10 * time.Second
	enclaveLook   = 20 * time.Millisecond
)

// awaitClient gives an enclave that is started again the time for that: an engine that comes meanwhile need not be turned away.
func (s *Supervisor) awaitClient(ctx context.Context) (*plugin.Client, error) {
	for end := time.Now().Add(enclaveWithin); ; time.Sleep(enclaveLook) {
		c, err := s.client()
		if !errors.Is(err, errNoEnclave) || ctx.Err() != nil || s.ctx.Err() != nil || time.Now().After(end) {
			return c, err
		}
	}
}

// EnclavePID is the process number of the enclave, 0 while there is none.
func (s *Supervisor) EnclavePID() int {
	c, err := s.client()
	if err != nil {
		return 0
	}
	return c.PID()
}

// Attest asks the enclave what protects it.
func (s *Supervisor) Attest(ctx context.Context, nonce []byte) (enclave.Report, error) {
	c, err := s.client()
	if err != nil {
		return enclave.Report{}, err
	}
	return c.Attest(ctx, nonce)
}

// keepEnclave waits for the enclave to die and starts another one, until the run ends.
func (s *Supervisor) keepEnclave() {
	for {
		c, err := s.client()
		if err != nil {
			return
		}
		select {
		case <-s.ctx.Done():
			c.Close()
			return
		case <-c.Done():
		}
		if s.ctx.Err() != nil {
			return
		}
		s.loseEnclave()
		if !s.restartEnclave() {
			return
		}
	}
}

func (s *Supervisor) loseEnclave() {
	s.mu.Lock()
	s.enclave = nil
	// Those that come meanwhile wait for the next one.
	peers := slices.Collect(maps.Keys(s.engines))
	var pids []int
	for _, p := range peers {
		pids = append(pids, p.PID)
	}
	s.mu.Unlock()
	s.cfg.Log.Error("the enclave process died; engines that used it are ended", "engines", len(pids))
	session.Stop("the enclave process died; this engine ends because it cannot go on without it", peers...)
	time.AfterFunc(killAfter, func() { s.killGreeted(pids) })
	if s.cfg.EnclaveLost != nil {
		s.cfg.EnclaveLost()
	}
}

// killGreeted ends engines that did not heed the word to stop, such as stopped ones.
func (s *Supervisor) killGreeted(pids []int) {
	for _, pid := range pids {
		if s.Greeted(pid) {
			_ = unix.Kill(pid, unix.SIGKILL)
		}
	}
}

func (s *Supervisor) restartEnclave() bool {
	c, err := plugin.StartWithBackoff(s.ctx, s.enclaveOptions(), func(err error, next time.Duration) {
		s.cfg.Log.Error("the enclave did not start again", "error", err, "next_try", next)
	})
	if err != nil {
		if s.ctx.Err() == nil {
			s.cfg.Log.Error("giving up on the enclave", "error", err)
		}
		return false
	}
	s.mu.Lock()
	s.enclave = c
	s.mu.Unlock()
	s.attestOnce()
	s.cfg.Log.Info("a new enclave is ready", "pid", c.PID())
	if s.cfg.EnclaveBack != nil {
		s.cfg.EnclaveBack()
	}
	return true
}

// Greeted says whether the process said hello and is still connected.
func (s *Supervisor) Greeted(pid int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for p := range s.engines {
		if p.PID == pid {
			return true
		}
	}
	return false
}

// Events so far.
func (s *Supervisor) Events() Events {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.events
	e.Refusals = append([]string(nil), e.Refusals...)
	e.Fatal = append([]string(nil), e.Fatal...)
	return e
}

// Close hangs up on every engine, which ends them, ends the enclave and removes what the run left on disk.
func (s *Supervisor) Close() {
	s.stop()
	s.server.Close()
	s.wg.Wait()
	s.dir.Remove()
}
