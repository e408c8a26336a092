package tee

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/kvshield/kvshield/enclave"
)

// fakeEGo is EGo with a script. As with the real one, sealing always succeeds.
type fakeEGo struct {
	reportErr  error
	debugErr   error
	isDebug    bool
	empty      bool
	reportData [][]byte
	seals      int
}

func (f *fakeEGo) remoteReport(reportData []byte) ([]byte, error) {
	f.reportData = append(f.reportData, bytes.Clone(reportData))
	if f.reportErr != nil {
		return nil, f.reportErr
	}
	if f.empty {
		return nil, nil
	}
	return append([]byte("quote over "), reportData...), nil
}

func (f *fakeEGo) debug() (bool, error) { return f.isDebug, f.debugErr }

func (f *fakeEGo) seal(plain []byte) ([]byte, error) {
	f.seals++
	return append([]byte("sealed "), plain...), nil
}

func (f *fakeEGo) unseal(sealed []byte) ([]byte, error) {
	f.seals++
	return bytes.TrimPrefix(sealed, []byte("sealed ")), nil
}

var errUnsupported = errors.New("OE_UNSUPPORTED")

func TestReportIsBoundToTheNonce(t *testing.T) {
	full := bytes.Repeat([]byte{0xa5}, MaxNonce)
	for name, nonce := range map[string][]byte{"none": nil, "short": []byte("nonce"), "full": full} {
		t.Run(name, func(t *testing.T) {
			fake := &fakeEGo{}
			b, err := newSGX(fake)
			if err != nil {
				t.Fatal(err)
			}
			report, err := b.Report(nonce)
			if err != nil {
				t.Fatal(err)
			}
			want := make([]byte, MaxNonce)
			copy(want, nonce)
			if got := fake.reportData[len(fake.reportData)-1]; !bytes.Equal(got, want) {
				t.Errorf("report data is %x, want %x", got, want)
			}
			if !bytes.HasSuffix(report.Evidence, want) {
				t.Error("the report does not carry the evidence over this nonce")
			}
			if report.Backend != "sgx" || !report.Hardware || len(report.Missing) != 0 {
				t.Errorf("report is %+v", report)
			}
		})
	}
}

func TestNonceTooLong(t *testing.T) {
	fake := &fakeEGo{}
	sgx, err := newSGX(fake)
	if err != nil {
		t.Fatal(err)
	}
	asked := len(fake.reportData)
	for name, b := range map[string]Backend{"sgx": sgx, "software": &SoftwareBackend{}} {
		if _, err := b.Report(make([]byte, MaxNonce+1)); !errors.Is(err, ErrNonce) {
			t.Errorf("%s: %v, want ErrNonce", name, err)
		}
	}
	if len(fake.reportData) != asked {
		t.Error("a nonce that does not fit reached the platform")
	}
}

func TestSGXFailsClosed(t *testing.T) {
	cases := map[string]*fakeEGo{
		"no report":     {reportErr: errUnsupported},
		"empty report":  {empty: true},
		"debug unknown": {debugErr: errUnsupported},
	}
	for name, fake := range cases {
		t.Run(name, func(t *testing.T) {
			if b, err := newSGX(fake); !errors.Is(err, ErrNoSGX) || b != nil {
				t.Errorf("got %v, %v, want ErrNoSGX", b, err)
			}
			if b, err := selectFrom(fake, noSoftware(t), "sgx", Options{}); !errors.Is(err, ErrNoSGX) || b != nil {
				t.Errorf("Select gave %v, %v, want ErrNoSGX and no backend", b, err)
			}
			if fake.seals != 0 {
				t.Error("something was sealed")
			}
		})
	}
}

// noSoftware is a software backend that must not be asked for.
func noSoftware(t *testing.T) func(Options) (*SoftwareBackend, error) {
	return func(Options) (*SoftwareBackend, error) {
		t.Error("the software backend was taken")
		return nil, errors.New("not asked for")
	}
}

func TestReportFailsLater(t *testing.T) {
	fake := &fakeEGo{}
	b, err := newSGX(fake)
	if err != nil {
		t.Fatal(err)
	}
	fake.reportErr = errUnsupported
	report, err := b.Report([]byte("n"))
	if !errors.Is(err, ErrNoSGX) || !errors.Is(err, errUnsupported) || report.Hardware {
		t.Errorf("got %+v, %v, want ErrNoSGX with its cause", report, err)
	}
}

func TestDebugEnclaveIsNoProtection(t *testing.T) {
	b, err := newSGX(&fakeEGo{isDebug: true})
	if err != nil {
		t.Fatal(err)
	}
	report, err := b.Report(nil)
	if err != nil {
		t.Fatal(err)
	}
	if report.Hardware || len(report.Missing) == 0 || !strings.Contains(report.Statement, "no hardware protection") {
		t.Errorf("a debug enclave reports %+v", report)
	}
}

func TestSealsOnlyAfterAReport(t *testing.T) {
	fake := &fakeEGo{reportErr: errUnsupported}
	b := &SGXBackend{platform: fake}
	refused := func(when string) {
		t.Helper()
		if out, err := b.Seal([]byte("root")); !errors.Is(err, ErrNotAttested) || out != nil {
			t.Errorf("%s: Seal gave %q, %v", when, out, err)
		}
		if out, err := b.Unseal([]byte("sealed root")); !errors.Is(err, ErrNotAttested) || out != nil {
			t.Errorf("%s: Unseal gave %q, %v", when, out, err)
		}
		if fake.seals != 0 {
			t.Errorf("%s: the platform sealed", when)
		}
	}
	refused("before any report")
	_, _ = b.Report(nil)
	refused("after a report that failed")

	fake.reportErr = nil
	if _, err := b.Report(nil); err != nil {
		t.Fatal(err)
	}
	sealed, err := b.Seal([]byte("root"))
	if err != nil {
		t.Fatal(err)
	}
	if plain, err := b.Unseal(sealed); err != nil || string(plain) != "root" {
		t.Errorf("unsealed %q, %v", plain, err)
	}
}

// The trap this package is built around: were this to change, the guard could be thought over.
func TestRealEGoOutsideAnEnclave(t *testing.T) {
	if _, err := (ego{}).remoteReport(make([]byte, MaxNonce)); err == nil {
		t.Skip("running inside an enclave")
	}
	sealed, err := (ego{}).seal([]byte("root"))
	if err != nil {
		t.Fatalf("EGo refuses to seal outside an enclave: %v", err)
	}
	if plain, err := (ego{}).unseal(sealed); err != nil || string(plain) != "root" {
		t.Fatalf("EGo unsealed %q, %v", plain, err)
	}

	if b, err := SGX(); !errors.Is(err, ErrNoSGX) || b != nil {
		t.Errorf("SGX gave %v, %v, want ErrNoSGX", b, err)
	}
	if out, err := (&SGXBackend{platform: ego{}}).Seal([]byte("root")); !errors.Is(err, ErrNotAttested) || out != nil {
		t.Errorf("Seal gave %q, %v, want ErrNotAttested", out, err)
	}
}

func TestSelect(t *testing.T) {
	soft := func(Options) (*SoftwareBackend, error) { return &SoftwareBackend{}, nil }
	broken := func(Options) (*SoftwareBackend, error) {
		return nil, &HardeningError{Measure: "x", Err: errUnsupported}
	}
	inside, outside := &fakeEGo{}, &fakeEGo{reportErr: errUnsupported}
	var hardening *HardeningError
	cases := []struct {
		name, backend string
		platform      platform
		software      func(Options) (*SoftwareBackend, error)
		want          string // the report's backend
		fails         func(error) bool
	}{
		{"sgx inside", "sgx", inside, noSoftware(t), "sgx", nil},
		{"software inside", "software", inside, soft, "software", nil},
		{"auto inside", "auto", inside, noSoftware(t), "sgx", nil},
		{"auto outside", "auto", outside, soft, "software", nil},
		{"auto, neither", "auto", outside, broken, "", func(err error) bool { return errors.As(err, &hardening) }},
		{"software broken", "software", outside, broken, "", func(err error) bool { return errors.As(err, &hardening) }},
		{"no name", "", inside, noSoftware(t), "", func(err error) bool { return errors.Is(err, ErrUnknownBackend) }},
		{"other name", "tdx", inside, noSoftware(t), "", func(err error) bool { return errors.Is(err, ErrUnknownBackend) }},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b, err := selectFrom(c.platform, c.software, c.backend, Options{})
			if c.fails != nil {
				if !c.fails(err) || b != nil {
					t.Errorf("got %v, %v", b, err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			report := mustReport(t, b)
			if report.Backend != c.want {
				t.Errorf("backend is %q, want %q", report.Backend, c.want)
			}
			fellBack := slices.ContainsFunc(report.Missing, func(s string) bool { return strings.HasPrefix(s, "sgx: ") })
			if want := c.name == "auto outside"; fellBack != want {
				t.Errorf("the report says that sgx is missing: %v, want %v (%q)", fellBack, want, report.Missing)
			}
		})
	}
}

func mustReport(t *testing.T, b Backend) enclave.Report {
	t.Helper()
	report, err := b.Report([]byte("nonce"))
	if err != nil {
		t.Fatal(err)
	}
	return report
}

func TestHardenRecordsAndFailsClosed(t *testing.T) {
	works := func(Options) (string, error) { return "done", nil }
	refused := func(Options) (string, error) { return "", errUnsupported }

	b, err := harden([]measure{{"a", true, works}, {"b", false, refused}, {"c", false, works}}, Options{})
	if err != nil {
		t.Fatal(err)
	}
	report := mustReport(t, b)
	if !slices.Equal(report.Hardening, []string{"a: done", "c: done"}) {
		t.Errorf("hardening is %q", report.Hardening)
	}
	if !slices.Equal(report.Missing, []string{"b: OE_UNSUPPORTED"}) {
		t.Errorf("missing is %q", report.Missing)
	}
	if report.Hardware || len(report.Evidence) != 0 || report.Statement != softwareStatement {
		t.Errorf("report claims too much: %+v", report)
	}

	var hardening *HardeningError
	b, err = harden([]measure{{"a", true, refused}, {"b", false, works}}, Options{})
	if b != nil || !errors.As(err, &hardening) || hardening.Measure != "a" || !errors.Is(err, errUnsupported) {
		t.Errorf("an essential measure was refused: got %v, %v", b, err)
	}
}

func TestNotDumpableIsEssential(t *testing.T) {
	for _, m := range measures {
		if want := m.name == "not dumpable"; m.essential != want {
			t.Errorf("%s: essential is %v, want %v", m.name, m.essential, want)
		}
	}
}
