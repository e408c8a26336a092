package supervisor

import (
	"context"
	"os"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/hooks/session"
)

// residing is a model whose KV cache the enclave keeps. Its file stays what it is.
type residing struct {
	id           enclave.ModelID
	file         os.FileInfo
	architecture string
}

// admit makes a model known to the enclave, once: engines open a file several times for one load.
func (e *engine) admit(ctx context.Context, path string, model *os.File) (session.Opened, error) {
	info, err := model.Stat()
	if err != nil {
		return session.Opened{}, err
	}
	for _, r := range e.resides {
		if os.SameFile(r.file, info) && r.file.Size() == info.Size() && r.file.ModTime().Equal(info.ModTime()) {
			return r.opened(), nil
		}
	}
	sources, _, err := openSources(modelPath{path, e.directory()}, model)
	defer closeAll(sources)
	if err != nil {
		return session.Opened{}, err
	}
	paths, release, err := e.enclave.Lend(ctx, sources...)
	if err != nil {
		return session.Opened{}, err
	}
	defer release()
	res, err := e.enclave.Load(ctx, enclave.LoadRequest{Sources: paths})
	if err != nil || res.Action == enclave.Pass {
		return session.Opened{}, err
	}
	r := residing{id: res.ID, architecture: res.Architecture}
	for _, f := range sources {
		if r.file, err = f.Stat(); err == nil {
			e.resides = append(e.resides, r)
		}
	}
	return r.opened(), e.enclave.Grant(ctx, e.plane, res.ID)
}

func (r *residing) opened() session.Opened {
	return session.Opened{Reside: true, Model: uint32(r.id), Marker: r.architecture[:min(len(r.architecture), session.MarkerMax)]}
}
