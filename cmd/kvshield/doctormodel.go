package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/enclave"
)

type doctorOptions struct {
	options
	onlyMode bool // the user asked about one mode
	context  int
}

// modePrefix begins the name of a finding about one mode, of which another may do.
const modePrefix = "mode "

// needed says whether something that is missing stops the user: one of the parts, or every mode for the model.
func needed(findings []finding) bool {
	modes, working := 0, 0
	for _, f := range findings {
		if !strings.HasPrefix(f.What, modePrefix) {
			if !f.OK {
				return true
			}
			continue
		}
		modes++
		if f.OK {
			working++
		}
	}
	return modes > 0 && working == 0
}

// modelFindings are one for the model and one for each mode.
func (o *doctorOptions) modelFindings(ctx context.Context, path string) ([]finding, error) {
	if o.context < 0 {
		return nil, usagef("--context %d: it takes a number of tokens", o.context)
	}
	ask := []string{modeResident, modePermute}
	if o.onlyMode && o.Mode != modeOff {
		ask = []string{o.Mode}
	}
	var list []finding
	for i, mode := range ask {
		m, err := o.inspect(ctx, mode, path)
		if i == 0 {
			if !refusal(err) && err != nil {
				return []finding{{"model", false, fmt.Sprintf("%s: %v", path, err), ""}}, nil
			}
			if err == nil {
				list = append(list, finding{"model", true, path + ": " + whatItIs(m), ""})
			}
		}
		list = append(list, o.modeFinding(mode, m, err))
	}
	return list, nil
}

// inspect asks an enclave of the given mode.
func (o *doctorOptions) inspect(ctx context.Context, mode, path string) (m enclave.Model, err error) {
	of := o.options
	of.Mode = mode
	err = of.withSupervisor(ctx, func(s *supervisor.Supervisor) error {
		m, err = s.Inspect(ctx, path)
		return err
	})
	return m, err
}

func refusal(err error) bool {
	var refused *enclave.RefusedError
	return errors.As(err, &refused)
}

func whatItIs(m enclave.Model) string {
	if m.Layers == 0 {
		return fmt.Sprintf("architecture %s", m.Architecture)
	}
	text := fmt.Sprintf("%s, %d layers, %d query heads, %d key/value heads of %d", m.Architecture, m.Layers, m.Heads, m.HeadsKV, m.HeadDim)
	if m.Context > 0 {
		text += fmt.Sprintf(", made for %d tokens", m.Context)
	}
	return text
}

func (o *doctorOptions) modeFinding(mode string, m enclave.Model, err error) finding {
	f := finding{What: modePrefix + mode, OK: err == nil}
	switch {
	case err != nil:
		f.Detail = err.Error()
	case m.Action == enclave.Pass:
		f.Detail = "nothing to shield: engines open this file as it is"
	case m.Action == enclave.Reside:
		f.Detail = "keeps " + o.cacheSize(m) + "; the engine's graph decides, before the first token, whether its attention is understood"
	default:
		f.Detail = fmt.Sprintf("rewrites %.1f MiB of %.1f MiB, which is what it takes in memory beside the file at any context", mib(m.ShieldBytes), mib(m.Bytes))
	}
	return f
}

// cacheSize is what the enclave needs for keys and values in F16.
func (o *doctorOptions) cacheSize(m enclave.Model) string {
	if m.CacheFloats == 0 {
		return "in the enclave what cache there is"
	}
	perToken := float64(2 * m.CacheFloats)
	text := fmt.Sprintf("the cache in the enclave: %.1f KiB for each token of context", perToken/1024)
	context := o.context
	if context == 0 {
		context = m.Context
	}
	if context > 0 {
		text += fmt.Sprintf(", %.1f MiB for %d (F16; layers with a sliding window take less)", perToken*float64(context)/(1<<20), context)
	}
	return text
}
