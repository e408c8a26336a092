#!/bin/sh
# Installs an official JavaScript client under .engine/, beside a program that uses it:
#
#   scripts/npm-client.sh FOLDER PACKAGE VERSION PROGRAM        or: make openai-client, make ollama-client
#
# Then: OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=KEY node .engine/openai/chat.mjs TEXT N
#       OLLAMA_HOST=http://127.0.0.1:8080 node .engine/ollama-js/ollama.mjs MODEL TEXT N
#
# Promises: the exact version, no install script of any package is run, nothing is done when it is up to date.
set -eu

die() { printf 'npm-client: %s\n' "$*" >&2; exit 1; }

[ $# = 4 ] || die 'usage: npm-client.sh FOLDER PACKAGE VERSION PROGRAM'
package=$2 version=$3 program=$4

top=$(cd "$(dirname "$0")/.." && pwd -P)
client=$top/.engine/$1

for tool in node npm; do
	command -v "$tool" >/dev/null || die "no $tool on this machine: install nodejs and npm"
done
mkdir -p "$top/.engine"
exec 9>"$top/.engine/.$1.lock"
flock 9
if [ "$(cat "$client/.stamp" 2>/dev/null)" != "$version" ]; then
	rm -rf "$client"
	mkdir -p "$client"
	printf '{"private": true, "type": "module"}\n' >"$client/package.json"
	(cd "$client" && npm install --silent --no-audit --no-fund --no-update-notifier --save-exact --omit=optional --ignore-scripts "$package@$version") ||
		die "npm could not install $package $version: check the network and npm's registry setting"
	echo "$version" >"$client/.stamp"
fi
# Node looks for packages from where a program lies.
cp "$top/$program" "$client/"
