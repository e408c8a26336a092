package plugin

import (
	"context"
	"os"
	"time"

	"github.com/hashicorp/go-hclog"
	goplugin "github.com/hashicorp/go-plugin"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/plugin/pb"
)

// Implementation is what an enclave process serves.
type Implementation struct {
	enclave.Loader
	enclave.Inverter
	enclave.Attester
	// Keeper, in mode resident; nil in others. Then there is no Inverter.
	Keeper enclave.Keeper
}

// Serve answers the host that started this process, until it hangs up. SocketDir is where the data plane's sockets
// go: a directory closed to other users.
func Serve(impl Implementation, socketDir string) error {
	s := newServer(impl, socketDir)
	var err error
	if s.files, err = listenFiles(socketDir, os.Getppid()); err != nil {
		return err
	}
	defer s.files.close()
	goplugin.Serve(&goplugin.ServeConfig{
		HandshakeConfig: handshake,
		Plugins:         goplugin.PluginSet{pluginName: &grpcPlugin{server: s}},
		GRPCServer:      goplugin.DefaultGRPCServer,
		// go-plugin's own debug lines name only addresses, but nothing of an enclave belongs in a log unasked.
		Logger: hclog.New(&hclog.LoggerOptions{Level: hclog.Error}),
	})
	return nil
}

type server struct {
	pb.UnimplementedEnclaveServer
	impl   Implementation
	planes *planes
	files  *fileDesk
}

func newServer(impl Implementation, socketDir string) *server {
	return &server{impl: impl, planes: newPlanes(impl, socketDir)}
}

func (s *server) Attest(ctx context.Context, r *pb.AttestRequest) (*pb.AttestReply, error) {
	a, err := s.impl.Attest(ctx, r.GetNonce())
	if err != nil {
		return nil, toStatus(err)
	}
	return &pb.AttestReply{Backend: a.Backend, Hardware: a.Hardware, Statement: a.Statement, Evidence: a.Evidence,
		Hardening: a.Hardening, Missing: a.Missing}, nil
}

func (s *server) Inspect(ctx context.Context, r *pb.InspectRequest) (*pb.Model, error) {
	m, err := s.impl.Inspect(ctx, r.GetSources())
	if err != nil {
		return nil, toStatus(err)
	}
	return modelToWire(m), nil
}

func (s *server) Load(ctx context.Context, r *pb.LoadRequest) (*pb.LoadReply, error) {
	res, err := s.impl.Load(ctx, enclave.LoadRequest{Sources: r.GetSources(), Outputs: r.GetOutputs()})
	if err != nil {
		return nil, toStatus(err)
	}
	reply := &pb.LoadReply{Id: uint32(res.ID), Model: modelToWire(res.Model), Fingerprint: res.Fingerprint, Marker: res.Marker, Pairs: widen(res.Pairs), FixedHeads: res.FixedHeads}
	for _, c := range res.Copies {
		reply.Copies = append(reply.Copies, &pb.Copy{File: uint32(c.File), From: uint64(c.From), To: uint64(c.To), Length: uint64(c.Length)})
	}
	for _, n := range res.OutputSizes {
		reply.OutputSizes = append(reply.OutputSizes, uint64(n))
	}
	return reply, nil
}

func (s *server) Unload(ctx context.Context, r *pb.UnloadRequest) (*pb.UnloadReply, error) {
	id := enclave.ModelID(r.GetId())
	s.planes.revoke(id)
	return &pb.UnloadReply{}, toStatus(s.impl.Unload(ctx, id))
}

func (s *server) Attach(_ context.Context, r *pb.AttachRequest) (*pb.AttachReply, error) {
	spin := time.Duration(r.GetSpinNanoseconds())
	var reply *pb.AttachReply
	var err error
	if path := r.GetSharedMemory(); path != "" {
		reply, err = s.planes.attachShared(path, spin)
	} else {
		reply, err = s.planes.attachSocket(r.GetSocketCapacity())
	}
	return reply, toStatus(err)
}

func (s *server) Grant(_ context.Context, r *pb.GrantRequest) (*pb.GrantReply, error) {
	return &pb.GrantReply{}, toStatus(s.planes.grant(r.GetPlane(), enclave.ModelID(r.GetModel())))
}

func (s *server) Detach(_ context.Context, r *pb.DetachRequest) (*pb.DetachReply, error) {
	return &pb.DetachReply{}, toStatus(s.planes.detach(r.GetPlane()))
}

func (s *server) Files(context.Context, *pb.FilesRequest) (*pb.FilesReply, error) {
	return &pb.FilesReply{Address: s.files.address()}, nil
}

func widen(list []uint16) (out []uint32) {
	for _, v := range list {
		out = append(out, uint32(v))
	}
	return out
}
