// Package plugin carries the enclave's contract across a process boundary with hashicorp/go-plugin: gRPC, mutual
// TLS made for each start, a protocol version.
//
// A host calls [Start], or [StartWithBackoff]; the enclave process calls [Serve]. Another TEE is another program
// that calls Serve. Paths, not descriptors, name files, because an SGX enclave can receive only paths.
//
// What it promises: a dead enclave closes [Client.Done] at once, and a frozen one soon. What it does not: go-plugin never
// restarts a plugin, and an enclave that was started again knows none of the models of the one before.
package plugin

import (
	"context"
	"errors"

	goplugin "github.com/hashicorp/go-plugin"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/kvshield/kvshield/enclave"
	"github.com/kvshield/kvshield/plugin/pb"
)

// handshake keeps a person from starting the enclave by hand and keeps versions apart. The cookie is not a secret
// and not security: that is mutual TLS and the runtime directory's mode.
var handshake = goplugin.HandshakeConfig{
	ProtocolVersion:  1,
	MagicCookieKey:   "KVSHIELD_PLUGIN_COOKIE",
	MagicCookieValue: "5f0c6a52-kv-cache-shield",
}

const pluginName = "enclave"

// grpcPlugin is both ends of the service, as go-plugin wants it.
type grpcPlugin struct {
	goplugin.NetRPCUnsupportedPlugin
	server *server // nil on the host
}

func (p *grpcPlugin) GRPCServer(_ *goplugin.GRPCBroker, s *grpc.Server) error {
	pb.RegisterEnclaveServer(s, p.server)
	return nil
}

func (p *grpcPlugin) GRPCClient(_ context.Context, _ *goplugin.GRPCBroker, c *grpc.ClientConn) (any, error) {
	return pb.NewEnclaveClient(c), nil
}

// toStatus keeps the kind of an error across the wire.
func toStatus(err error) error {
	var refused *enclave.RefusedError
	var invalid *enclave.InvalidError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused):
		return status.Error(codes.FailedPrecondition, err.Error())
	case errors.As(err, &invalid):
		return status.Error(codes.InvalidArgument, err.Error())
	case errors.Is(err, enclave.ErrUnknownModel):
		return status.Error(codes.NotFound, err.Error())
	}
	return status.Error(codes.Internal, err.Error())
}

func fromStatus(err error) error {
	s, ok := status.FromError(err)
	if err == nil || !ok {
		return err
	}
	switch s.Code() {
	case codes.FailedPrecondition:
		return &enclave.RefusedError{Reason: s.Message()}
	case codes.InvalidArgument:
		return &enclave.InvalidError{Reason: s.Message()}
	case codes.NotFound:
		return enclave.ErrUnknownModel
	case codes.Unavailable, codes.Canceled, codes.DeadlineExceeded:
		return &GoneError{s.Message()}
	}
	return errors.New(s.Message())
}

// GoneError is an enclave that died or does not answer.
type GoneError struct{ Detail string }

func (e *GoneError) Error() string { return "the enclave process does not answer" }

func modelToWire(m enclave.Model) *pb.Model {
	return &pb.Model{
		Action: pb.Model_Action(m.Action), Architecture: m.Architecture, Name: m.Name, Files: uint32(m.Files),
		Layers: uint32(m.Layers), Heads: uint32(m.Heads), HeadsKv: uint32(m.HeadsKV), HeadDim: uint32(m.HeadDim),
		RowFloats: uint32(m.RowFloats), Bytes: uint64(m.Bytes), ShieldBytes: uint64(m.ShieldBytes),
		RotaryDim: uint32(m.RotaryDim), RotaryBase: m.RotaryBase, Context: uint32(m.Context), CacheFloats: uint64(m.CacheFloats),
	}
}

func modelFromWire(m *pb.Model) enclave.Model {
	return enclave.Model{
		Action: enclave.Action(m.GetAction()), Architecture: m.GetArchitecture(), Name: m.GetName(), Files: int(m.GetFiles()),
		Layers: int(m.GetLayers()), Heads: int(m.GetHeads()), HeadsKV: int(m.GetHeadsKv()), HeadDim: int(m.GetHeadDim()),
		RowFloats: int(m.GetRowFloats()), Bytes: int64(m.GetBytes()), ShieldBytes: int64(m.GetShieldBytes()),
		RotaryDim: int(m.GetRotaryDim()), RotaryBase: m.GetRotaryBase(), Context: int(m.GetContext()), CacheFloats: int64(m.GetCacheFloats()),
	}
}
