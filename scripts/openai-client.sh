#!/bin/sh
# Installs the OpenAI JavaScript client under .engine/openai/:
#
#   scripts/openai-client.sh         or: make openai-client
#
# Then: OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=KEY node .engine/openai/chat.mjs TEXT N
#
# Promises: the exact version below, no install script of any package is run, nothing is done when it is up to date.
set -eu

version=7.57.0

top=$(cd "$(dirname "$0")/.." && pwd -P)
client=$top/.engine/openai

die() { printf 'openai-client: %s\n' "$*" >&2; exit 1; }

for tool in node npm; do
	command -v "$tool" >/dev/null || die "no $tool on this machine: install nodejs and npm"
done
mkdir -p "$top/.engine"
exec 9>"$top/.engine/.openai.lock"
flock 9
if [ "$(cat "$client/.stamp" 2>/dev/null)" != "$version" ]; then
	rm -rf "$client"
	mkdir -p "$client"
	printf '{"private": true, "type": "module"}\n' >"$client/package.json"
	(cd "$client" && npm install --silent --no-audit --no-fund --no-update-notifier --save-exact --omit=optional --ignore-scripts "openai@$version") ||
		die "npm could not install openai $version: check the network and npm's registry setting"
	echo "$version" >"$client/.stamp"
fi
# Node looks for packages from where a program lies.
cp "$top/examples/node/chat.mjs" "$client/chat.mjs"
