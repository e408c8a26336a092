#!/bin/sh
# Installs node-llama-cpp, a Node host of llama.cpp, under .engine/node/:
#
#   scripts/node-host.sh         or: make node-host
#
# Then: node .engine/node/complete.mjs MODEL PROMPT N
#
# Limits: the CPU build for this machine alone, since all builds together take 700 MB. Promises: the
# exact version below, no install script of any package is run, nothing is done when it is up to date.
set -eu

version=3.22.1

here=$(cd "$(dirname "$0")" && pwd -P)
top=$(dirname "$here")
node=$top/.engine/node

say() { printf 'node-host: %s\n' "$*"; }
die() { printf 'node-host: %s\n' "$*" >&2; exit 1; }

platform() {
	case $(uname -m) in
	x86_64) echo linux-x64 ;;
	aarch64) echo linux-arm64 ;;
	*) die "node-llama-cpp has no build for $(uname -m): run this on x86_64 or aarch64" ;;
	esac
}

need_tools() {
	for tool in node npm; do
		command -v "$tool" >/dev/null || die "no $tool on this machine: install nodejs and npm"
	done
	major=$(node -p 'process.versions.node.split(".")[0]')
	[ "$major" -ge 20 ] || die "node $(node --version) is too old: install nodejs 20 or newer"
}

install() {
	say "installing node-llama-cpp $version"
	rm -rf "$node"
	mkdir -p "$node"
	printf '{"private": true, "type": "module"}\n' >"$node/package.json"
	(cd "$node" && npm install --silent --no-audit --no-fund --no-update-notifier --save-exact \
		--omit=optional --ignore-scripts \
		"node-llama-cpp@$version" "@node-llama-cpp/$platform@$version") ||
		die "npm could not install node-llama-cpp $version: check the network and npm's registry setting"
}

need_tools
platform=$(platform)
mkdir -p "$top/.engine"
exec 9>"$top/.engine/.node.lock"
flock 9
if [ "$(cat "$node/.stamp" 2>/dev/null)" != "$version $platform" ]; then
	install
	echo "$version $platform" >"$node/.stamp"
fi
# Node looks for packages from where a program lies.
cp "$top/examples/node/complete.mjs" "$node/complete.mjs"
say "ready in $node"
