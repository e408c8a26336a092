package bench

import (
	"fmt"
	"io"
	"text/tabwriter"
)

// WriteTable prints the report for people.
func (r *Report) WriteTable(w io.Writer) error {
	fmt.Fprintf(w, "%s: %s, %s, mode %s; llama.cpp %s (%d), %s, %d threads\n\n", r.Model.Path, r.Model.Type,
		count(r.Model.Parameters), r.modeText(), r.Engine.Build, r.Engine.Number, r.Engine.Backends, r.Engine.Threads)
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tstock\tshielded\tratio\t[min\tmax]\t")
	line(t, fmt.Sprintf("prefill %d, tokens/s", r.Prefill.Tokens), r.Prefill.PerSecond, 1, "%.1f")
	line(t, fmt.Sprintf("decode %d, tokens/s", r.Decode.Tokens), r.Decode.PerSecond, 1, "%.2f")
	line(t, "load, s", r.Load, 1, "%.3f")
	line(t, "peak memory, MiB", r.Memory.Peak, 1<<20, "%.1f")
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(w, "\nratio: shielded / stock, median over the pairs (%d) taken in turns; higher is better for tokens/s, lower for the rest\n", r.Runs)
	r.writeMemory(w)
	r.writeTransitions(w)
	r.writeCurve(w)
	return nil
}

func (r *Report) modeText() string {
	if r.DataPlane == "" {
		return r.Mode + " (stock on both sides)"
	}
	return r.Mode + ", data plane " + r.DataPlane
}

func line(w io.Writer, name string, c Comparison, unit float64, format string) {
	fmt.Fprintf(w, "%s\t"+format+"\t"+format+"\t%.3f\t[%.3f\t%.3f]\t\n", name,
		c.Stock.Median/unit, c.Shielded.Median/unit, c.Ratio.Median, c.Ratio.Min, c.Ratio.Max)
}

func (r *Report) writeMemory(w io.Writer) {
	m := r.Memory
	fmt.Fprintf(w, "\npeak memory: proportional set size of the run's processes, and the shielded model whole, mapped or not; at the highest:\n")
	fmt.Fprintf(w, "  stock      engine %s (of which mapped files %s)\n", mib(m.Stock.Engine), mib(m.Stock.Files))
	if r.DataPlane == "" {
		return
	}
	fmt.Fprintf(w, "  shielded   engine %s, enclave %s, supervisor %s (of which mapped files %s), shielded model %s\n",
		mib(m.Shielded.Engine), mib(m.Shielded.Enclave), mib(m.Shielded.Supervisor), mib(m.Shielded.Files), mib(m.Shielded.Copy))
	fmt.Fprintf(w, "  shielded - shielded model - stock: %s (median over the pairs)\n", mib(int64(m.Beyond.Median)))
	if m.Resident {
		fmt.Fprintln(w, "  the enclave shows its shares to root only: its whole resident set is counted")
	}
}

func (r *Report) writeTransitions(w io.Writer) {
	switch {
	case r.DataPlane == "":
		return
	case r.Decode.Transitions.Count == 0:
		fmt.Fprintf(w, "\ntransitions: not counted with the data plane %s\n", r.DataPlane)
		return
	}
	fmt.Fprintln(w, "\ntransition latency, µs")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tp50\tp99\tmean\tcount\tKiB each way\t")
	for _, row := range []struct {
		name string
		Transitions
	}{{"prefill", r.Prefill.Transitions}, {"decode", r.Decode.Transitions}} {
		fmt.Fprintf(t, "%s\t%.1f\t%.1f\t%.1f\t%d\t%.1f\t\n", row.name, row.P50, row.P99, row.Mean, row.Count, row.Bytes/1024)
	}
	t.Flush()
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

func count(parameters int64) string {
	switch n := float64(parameters); {
	case n >= 1e9:
		return fmt.Sprintf("%.2fB parameters", n/1e9)
	default:
		return fmt.Sprintf("%.2fM parameters", n/1e6)
	}
}
