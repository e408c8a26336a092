#!/bin/sh
# Builds Ollama's embedded generation twice, in the same way:
#
#   scripts/ollama.sh            or: make ollama
#
#   bin/kvshield-ollama          with kvshield's hook linked in
#   .engine/ollama/bin/ollama    stock, to compare with
#
#   scripts/ollama.sh go ARGUMENTS     go with the same flags, in the module, so that nothing is compiled again
#
# Needs a C++ compiler and the sources of Ollama from the Go module proxy. Three headers that the module does not
# carry come from Debian. Both are built for the processor of this machine (OLLAMA_CPU=native); say OLLAMA_CPU=x86-64-v3, for
# instance, to build for others.
set -eu

# shellcheck disable=SC2034 # for debian.sh
packages='nlohmann-json3-dev libstb-dev libminiaudio-dev' suite=sid

here=$(cd "$(dirname "$0")" && pwd -P)
root=$(dirname "$here")
ollama=$root/.engine/ollama

say() { printf 'ollama: %s\n' "$*"; }
die() { printf 'ollama: %s\n' "$*" >&2; exit 1; }

headers() {
	[ ! -d "$ollama/include" ] || return 0
	work=$(mktemp -d "$ollama/.work.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	trap 'exit 130' HUP INT TERM
	# shellcheck source=scripts/debian.sh
	. "$here/debian.sh"
	download
	# shellcheck disable=SC2154 # apt is set by download
	for deb in "$apt"/archives/nlohmann-json3-dev_*.deb "$apt"/archives/libstb-dev_*.deb "$apt"/archives/libminiaudio-dev_*.deb; do
		dpkg-deb -x "$deb" "$work/root"
	done
	mkdir -p "$work/include/miniaudio"
	mv "$work/root/usr/include/nlohmann" "$work/root/usr/include/stb" "$work/include/"
	mv "$work/root/usr/include/miniaudio.h" "$work/include/miniaudio/"
	mv "$work/include" "$ollama/include"
}

build() {
	version=$(go list -m -f '{{.Version}}' github.com/ollama/ollama)
	say "building Ollama $version"
	# The linker's input changes with the hook, which go's cache does not see: hence its sum.
	sum=$(cksum <"$ollama/libkvshook.a")
	go build -trimpath \
		-ldflags "-X github.com/ollama/ollama/version.Version=${version#v} $2${sum%% *}" -o "$1" "$3"
}

mkdir -p "$ollama" "$root/bin"
for tool in go gcc g++ make; do
	command -v "$tool" >/dev/null || die "no $tool on this machine: install it (Debian: apt-get install golang g++ make)"
done
headers
cd "$root/adapters/ollama/embedded"
go mod download github.com/ollama/ollama
make --no-print-directory -C hook/link OUT="$ollama/libkvshook.a" BUILD="$ollama/hook" \
	GGML="$(go list -m -f '{{.Dir}}' github.com/ollama/ollama)/ml/backend/ggml/ggml/include"
flags="-O3 -march=${OLLAMA_CPU:-native} -I$ollama/include"
export CGO_ENABLED=1 CGO_CFLAGS="$flags" CGO_CXXFLAGS="$flags"
if [ "${1-}" = go ]; then exec "$@"; fi
build "$root/bin/kvshield-ollama" '-X github.com/kvshield/kvshield/adapters/ollama/embedded/shield.hookSum=' ./cmd/kvshield-ollama
build "$ollama/bin/ollama" '-X main.unused=' github.com/ollama/ollama
say "ready: bin/kvshield-ollama, and .engine/ollama/bin/ollama to compare with"
