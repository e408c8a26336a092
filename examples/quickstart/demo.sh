#!/bin/bash
# Shows a shielded llama-server beside the stock one, on the same model and the same questions:
#
#   examples/quickstart/demo.sh [MODEL.gguf]      or: make demo
#
# Needs what `make build engine` makes, and Go. The exit code is 0 when all answers are equal.
# Promises: nothing listens anywhere but on this machine, and no process and no file is left at the end.
set -euo pipefail
cd "$(dirname "$0")/../.."

model=${1:-examples/model/demo.gguf}
engine=.engine/bin/llama-server

die() {
	echo "demo: $*" >&2
	exit 1
}

for program in bin/kvshield bin/kvshield-enclave bin/libkvshield.so "$engine"; do
	[[ -e $program ]] || die "$program is missing: run \`make build engine\`"
done
command -v go >/dev/null || die "no go on this machine: install it (Debian: apt-get install golang)"

# A socket's path is short; a user's TMPDIR may not be.
dir=$(mktemp -d /tmp/kvshield-demo.XXXXXX)
processes=()

# end stops what was started, waits until it is gone, and removes what it printed.
end() {
	local status=$?
	trap '' INT TERM
	if ((${#processes[@]})); then
		kill "${processes[@]}" 2>/dev/null || :
		wait "${processes[@]}" 2>/dev/null || :
	fi
	rm -rf "$dir"
	exit "$status"
}
trap end EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

# until_there NAME PID COMMAND… waits until COMMAND succeeds, and gives up when the server ends.
until_there() {
	local name=$1 pid=$2
	shift 2
	until "$@"; do
		kill -0 "$pid" 2>/dev/null || die "the $name server ended:"$'\n'"$(tail -n 12 "$dir/$name.log")"
		sleep 0.1
	done
}

echo "1. What protects the enclave on this machine (kvshield attest)"
echo
bin/kvshield attest
echo

echo "2. The stock llama-server and the shielded one (kvshield serve -m $model)"
echo
"$engine" -m "$model" --host "$dir/stock.sock" >"$dir/stock.log" 2>&1 &
processes+=($!)
until_there stock $! test -S "$dir/stock.sock"
# Port 0: the kernel picks one that is free.
bin/kvshield serve -m "$model" --listen 127.0.0.1:0 --engine "$engine" 2>"$dir/shielded.log" &
processes+=($!)
until_there shielded $! grep -q ' on http://' "$dir/shielded.log"
cat "$dir/shielded.log"
echo
address=$(sed -n 's/.* on \(http:[^ ]*\).*/\1/p' "$dir/shielded.log")

echo "3. The same questions to both, greedy decoding, as the answers are streamed"
go build -o "$dir/ask" ./examples/quickstart
# In the background, because bash heeds a signal only between commands and in wait.
"$dir/ask" "$dir/stock.sock" "$address" &
processes+=($!)
wait $!
