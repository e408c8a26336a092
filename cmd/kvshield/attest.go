package main

import (
	"context"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/kvshield/kvshield/adapters/supervisor"
	"github.com/kvshield/kvshield/enclave"
)

// attestation is what `kvshield attest --json` prints.
type attestation struct {
	Backend   string   `json:"backend"`
	Hardware  bool     `json:"hardware_protection"`
	Statement string   `json:"statement"`
	Nonce     string   `json:"nonce"`              // hex
	Evidence  string   `json:"evidence,omitempty"` // base64, with hardware only
	Hardening []string `json:"hardening,omitempty"`
	Missing   []string `json:"missing,omitempty"`
}

func newAttest() *cobra.Command {
	var o options
	var asJSON bool
	var nonceHex string
	cmd := &cobra.Command{
		Use:   "attest",
		Short: "say what protects the enclave, with the hardware's report where there is one",
		Long: `Starts an enclave process and asks it what protects it. With SGX the answer carries a remote
attestation report bound to the nonce; without, it says plainly that there is no hardware protection.`,
		Args: exactly(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			nonce, err := attestNonce(nonceHex)
			if err != nil {
				return err
			}
			report, err := attest(cmd.Context(), &o, nonce)
			if err != nil {
				return err
			}
			a := attestation{report.Backend, report.Hardware, report.Statement, hex.EncodeToString(nonce),
				base64.StdEncoding.EncodeToString(report.Evidence), report.Hardening, report.Missing}
			if asJSON {
				return printJSON(cmd.OutOrStdout(), a)
			}
			a.print(cmd.OutOrStdout())
			return nil
		},
	}
	o.register(cmd)
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().StringVar(&nonceHex, "nonce", "", "up to 64 bytes in hexadecimal to bind into the report (default: 32 random bytes)")
	return cmd
}

func attestNonce(text string) ([]byte, error) {
	if text == "" {
		nonce := make([]byte, 32)
		rand.Read(nonce)
		return nonce, nil
	}
	nonce, err := hex.DecodeString(text)
	if err != nil || len(nonce) > 64 {
		return nil, usagef("--nonce takes up to 64 bytes in hexadecimal")
	}
	return nonce, nil
}

func attest(ctx context.Context, o *options, nonce []byte) (report enclave.Report, err error) {
	err = o.withSupervisor(ctx, func(s *supervisor.Supervisor) error {
		report, err = s.Attest(ctx, nonce)
		return err
	})
	return report, err
}

func (a attestation) print(w io.Writer) {
	fmt.Fprintf(w, "backend:   %s\n%s\n", a.Backend, a.Statement)
	for _, h := range a.Hardening {
		fmt.Fprintf(w, "  has      %s\n", h)
	}
	for _, m := range a.Missing {
		fmt.Fprintf(w, "  lacks    %s\n", m)
	}
	if a.Evidence != "" {
		fmt.Fprintf(w, "nonce:     %s\nevidence:  %s\n", a.Nonce, a.Evidence)
	}
}

func printJSON(w io.Writer, v any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	return enc.Encode(v)
}
