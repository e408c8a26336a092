package supervisor

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/dataplane"
	"github.com/kvshield/kvshield/hooks/meter"
	"github.com/kvshield/kvshield/hooks/session"
	"github.com/kvshield/kvshield/plugin"
)

const detachWithin = 5 * time.Second

// engine is one process that said hello.
type engine struct {
	enclave *plugin.Client
	pid     int
	plane   uint32       // 0 while there is none
	meter   *meter.Meter // nil before its hook was told to count; under the supervisor's lock
	sets    []*modelSet
	resides []residing
	clear   string // the model that it runs in the clear, as its user allows
	// Under the supervisor's lock.
	models   []ModelStatus
	shielded []uint32 // numbers of models
}

// Hello implements session.Handler.
func (s *Supervisor) Hello(ctx context.Context, p *session.Peer, h session.Hello) (session.Welcome, *os.File, error) {
	if s.cfg.Observe {
		s.adopt(p, &engine{pid: p.PID})
		return s.welcome(), nil, nil
	}
	for end := time.Now().Add(enclaveWithin); ; {
		file, err := s.greet(ctx, p)
		if err == nil {
			s.cfg.Log.Debug("an engine said hello", "pid", p.PID, "ggml", h.Version)
			return s.welcome(), file, nil
		}
		// An enclave that died while it was asked is no reason to turn an engine away: the next one can have it.
		if gone := (*plugin.GoneError)(nil); !errors.As(err, &gone) && !errors.Is(err, errLost) || time.Now().After(end) || s.ctx.Err() != nil {
			return session.Welcome{}, nil, err
		}
		time.Sleep(enclaveLook)
	}
}

// errLost is an enclave that died before an engine was its own.
var errLost = fmt.Errorf("%w (it died in between)", errNoEnclave)

func (s *Supervisor) greet(ctx context.Context, p *session.Peer) (*os.File, error) {
	c, err := s.awaitClient(ctx)
	if err != nil {
		return nil, err
	}
	e := &engine{enclave: c, pid: p.PID}
	file, err := s.attach(ctx, e)
	if err == nil && !s.adopt(p, e) {
		file.Close()
		err = errLost
	}
	if err != nil {
		e.release(s.cfg.Log.Debug)
		return nil, err
	}
	return file, nil
}

func (s *Supervisor) welcome() session.Welcome {
	return session.Welcome{Transport: s.cfg.Transport, Capacity: s.cfg.Capacity, SpinMicro: uint32(s.cfg.Spin.Microseconds()),
		TimeoutMS: uint32(s.cfg.Timeout.Milliseconds()), Dumps: s.cfg.Audit, Observe: s.cfg.Observe,
		Resident: s.cfg.Resident, Scrub: s.cfg.Scrub}
}

// adopt is false when the enclave died meanwhile: the engines that it had were already told to end.
func (s *Supervisor) adopt(p *session.Peer, e *engine) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.enclave != e.enclave {
		return false
	}
	s.engines[p] = e
	return true
}

func (s *Supervisor) attach(ctx context.Context, e *engine) (*os.File, error) {
	if s.cfg.Transport == session.Socket {
		return s.attachSocket(ctx, e)
	}
	return s.attachShared(ctx, e)
}

func (s *Supervisor) attachShared(ctx context.Context, e *engine) (*os.File, error) {
	f, err := dataplane.Create(s.cfg.Capacity)
	if err != nil {
		return nil, err
	}
	if err := s.shareRegion(ctx, e, f); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

func (s *Supervisor) shareRegion(ctx context.Context, e *engine, f *os.File) error {
	paths, release, err := e.enclave.Lend(ctx, f)
	if err != nil {
		return err
	}
	defer release()
	plane, err := e.enclave.AttachShared(ctx, paths[0], s.cfg.Spin)
	if err != nil {
		return err
	}
	e.plane = plane.ID
	return nil
}

func (s *Supervisor) attachSocket(ctx context.Context, e *engine) (*os.File, error) {
	plane, err := e.enclave.AttachSocket(ctx, s.cfg.Capacity)
	if err != nil {
		return nil, err
	}
	e.plane = plane.ID
	conn, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: plane.Address, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("cannot reach the enclave's data plane: %w", err)
	}
	defer conn.Close()
	if _, err := conn.Write(plane.Token); err != nil {
		return nil, fmt.Errorf("cannot reach the enclave's data plane: %w", err)
	}
	return conn.File()
}

// Open implements session.Handler.
func (s *Supervisor) Open(ctx context.Context, p *session.Peer, path string, model *os.File) (session.Opened, *os.File, error) {
	s.mu.Lock()
	e := s.engines[p]
	s.mu.Unlock()
	if e == nil {
		return session.Opened{}, nil, errors.New("said no hello")
	}
	var opened session.Opened
	var file *os.File
	var err error
	if !s.cfg.Observe {
		opened, file, err = s.openFor(ctx, e, path, model)
	}
	s.mu.Lock()
	switch {
	case err != nil:
		s.events.Refusals = note(s.events.Refusals, fmt.Sprintf("%s: %v", path, err))
	case opened.Shield, opened.Reside:
		if !slices.Contains(e.shielded, opened.Model) {
			e.shielded = append(e.shielded, opened.Model)
			s.events.Shielded++
		}
	case opened.Clear:
		s.events.Clear++
	default:
		s.events.Passed++
	}
	if err == nil && len(e.models) < maxNotes {
		e.models = append(e.models, ModelStatus{path, how(opened)})
	}
	s.mu.Unlock()
	s.writeStatus()
	s.cfg.Log.Debug("an engine opened a model", "pid", p.PID, "model", filepath.Base(path), "shielded", opened.Shield || opened.Reside, "error", err)
	return opened, file, err
}

// openFor runs a model in the clear where its user allows that. A process does so with all of its models or with none: its hook
// tells graphs apart by what was shielded.
func (s *Supervisor) openFor(ctx context.Context, e *engine, path string, model *os.File) (session.Opened, *os.File, error) {
	if s.allows(model) {
		if len(e.sets)+len(e.resides) > 0 {
			return session.Opened{}, nil, enclave.Refuse("it is allowed to run unshielded, but this process has shielded models as well; allow all of them or none")
		}
		e.clear = path
		s.cfg.Log.Warn("a model runs IN THE CLEAR, as is allowed by --allow-unshielded", "pid", e.pid, "model", path)
		return session.Opened{Clear: true}, nil, nil
	}
	opened, file, err := e.open(ctx, path, model, s.cfg.Resident)
	if err == nil && e.clear != "" && (opened.Shield || opened.Reside) {
		if file != nil {
			file.Close()
		}
		return session.Opened{}, nil, enclave.Refuse("this process runs %s in the clear, as is allowed; allow this model as well, or none", e.clear)
	}
	return opened, file, err
}

// allows asks by the file that was opened, not by the name that the engine says it has.
func (s *Supervisor) allows(model *os.File) bool {
	if s.cfg.Allowed == nil {
		return false
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", model.Fd()))
	return err == nil && s.cfg.Allowed(path)
}

func (e *engine) open(ctx context.Context, path string, model *os.File, resident bool) (session.Opened, *os.File, error) {
	if opened, f, err := e.laterSplit(path, model); !errors.Is(err, errNotOfSet) {
		return opened, f, err
	}
	if resident {
		opened, err := e.admit(ctx, path, model)
		return opened, nil, err
	}
	set, err := loadSet(ctx, e.enclave, modelPath{path, e.directory()}, model)
	if err != nil || set == nil {
		return session.Opened{}, nil, err
	}
	if err := e.enclave.Grant(ctx, e.plane, set.id); err != nil {
		set.discard()
		return session.Opened{}, nil, err
	}
	e.sets = append(e.sets, set)
	return set.take(path, model)
}

// directory is what relative paths of the process start from.
func (e *engine) directory() string { return fmt.Sprintf("/proc/%d/cwd", e.pid) }

// laterSplit returns the shielded file of a split whose set was loaded with an earlier one.
func (e *engine) laterSplit(path string, model *os.File) (session.Opened, *os.File, error) {
	for _, set := range e.sets {
		if opened, f, err := set.take(path, model); !errors.Is(err, errNotOfSet) {
			return opened, f, err
		}
	}
	return session.Opened{}, nil, errNotOfSet
}

// Fatal implements session.Handler.
func (s *Supervisor) Fatal(p *session.Peer, message string) {
	s.mu.Lock()
	s.events.Fatal = note(s.events.Fatal, message)
	s.mu.Unlock()
	s.cfg.Log.Error("a hook ended its engine", "pid", p.PID, "reason", message)
	if s.cfg.Ended != nil {
		s.cfg.Ended(p.PID, message)
	}
}

// Gone implements session.Handler.
func (s *Supervisor) Gone(p *session.Peer) {
	s.mu.Lock()
	e := s.engines[p]
	delete(s.engines, p)
	if e != nil {
		s.closeMeter(e)
	}
	s.mu.Unlock()
	s.writeStatus()
	if e != nil {
		e.release(s.cfg.Log.Debug)
	}
}

// release gives back what the enclave holds for an engine that is gone: its data plane and its keys.
func (e *engine) release(log func(string, ...any)) {
	ctx, cancel := context.WithTimeout(context.Background(), detachWithin)
	defer cancel()
	report := func(what string, err error) {
		var gone *plugin.GoneError
		if err != nil && !errors.As(err, &gone) {
			log("an engine's rest could not be released", "what", what, "error", err)
		}
	}
	if e.plane != 0 {
		report("data plane", e.enclave.Detach(ctx, e.plane))
	}
	for _, set := range e.sets {
		set.discard()
		report("model", e.enclave.Unload(ctx, set.id))
	}
	for _, r := range e.resides {
		report("model", e.enclave.Unload(ctx, r.id))
	}
}

var _ session.Handler = (*Supervisor)(nil)

// Inspect says what would be done with the model at path.
func (s *Supervisor) Inspect(ctx context.Context, path string) (enclave.Model, error) {
	c, err := s.client()
	if err != nil {
		return enclave.Model{}, err
	}
	f, err := openModel(path)
	if err != nil {
		return enclave.Model{}, err
	}
	defer f.Close()
	sources, _, err := openSources(modelPath{name: path}, f)
	defer closeAll(sources)
	if err != nil {
		return enclave.Model{}, err
	}
	paths, release, err := c.Lend(ctx, sources...)
	if err != nil {
		return enclave.Model{}, err
	}
	defer release()
	return c.Inspect(ctx, paths)
}
