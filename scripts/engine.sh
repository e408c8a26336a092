#!/bin/sh
# Installs a private llama.cpp engine under .engine/ without touching the system:
#
#   scripts/engine.sh            or: make engine
#
# Start with .engine/bin/llama-server. What is there afterwards:
#
#   bin/         the engine programs, with ggml's backends beside them, where ggml looks
#   lib/         libllama, libggml and their kin
#   deps/        everything these need, their own libc and loader included
#   share/       Vulkan driver manifests
#   vulkan.env   environment, KEY=VALUE, that makes Mesa's software device visible to ggml
#   VERSION      the packages it was made of
#
# Limits: the programs come from Debian's suite sid, at the version the archive holds today, and
# are never upgraded by themselves: remove .engine/bin to get newer ones. lib/ is built for the libc in
# deps/; a program with an older libc cannot load it. Where Debian's own ggml is installed, its
# backends are candidates too, because libggml also looks in that package's folder.
# Promises: the programs take no library from the system that the packages hold; a download that
# fails leaves the engine that was there before; nothing is done when it is up to date.
set -eu

packages='llama.cpp-tools llama.cpp-tools-extra libggml0-backend-vulkan mesa-vulkan-drivers patchelf'
suite=sid

here=$(cd "$(dirname "$0")" && pwd -P)
engine=$(dirname "$here")/.engine

say() { printf 'engine: %s\n' "$*"; }
die() { printf 'engine: %s\n' "$*" >&2; exit 1; }

# The interpreter in the programs is an absolute path, so a moved tree is out of date.
stamp() { printf '%s %s\n' "$(cat "$here/engine.sh" "$here/debian.sh" | cksum)" "$engine"; }

# shellcheck source=scripts/debian.sh
. "$here/debian.sh"

up_to_date() {
	[ -x "$engine/bin/llama-server" ] && [ "$(cat "$engine/.stamp" 2>/dev/null)" = "$(stamp)" ]
}

need_tools() {
	for tool in apt-get apt-config dpkg dpkg-deb; do
		command -v "$tool" >/dev/null || die "no $tool on this machine: the engine is made of Debian" \
			"packages. Run this on Debian, or use an installed engine: kvshield serve --engine PATH"
	done
}

unpack() {
	say "unpacking $(find "$apt/archives" -name '*.deb' | wc -l) packages"
	for deb in "$apt"/archives/*.deb; do
		dpkg-deb -x "$deb" "$work/root"
		dpkg-deb -f "$deb" Package Version >"$work/fields"
		sed 's/^[^:]*: //' "$work/fields" | paste -d ' ' - - >>"$work/VERSION"
	done
	rm -r "$apt"
}

# arrange sorts what was unpacked into bin, lib, deps and share.
arrange() {
	mkdir "$work/bin" "$work/lib" "$work/deps" "$work/share"
	usr=$work/root/usr
	mv "$usr"/bin/llama-* "$usr"/lib/*/ggml/backends*/*.so "$work/bin/"
	mv "$usr"/lib/*/libllama* "$usr"/lib/*/libggml* "$usr"/lib/*/libmtmd* "$usr"/lib/*/llama/*.so \
		"$work/lib/"
	find "$usr/lib" -maxdepth 2 -name '*.so*' ! -type d -exec mv {} "$work/deps/" \;
	find "$work/deps" -name 'ld-linux*' ! -type l >"$work/loader"
	[ -s "$work/loader" ] || die "the packages hold no loader: suite $suite has changed, report this"
	loader=$(basename "$(cat "$work/loader")")
}

# patchelf comes from the same suite and so runs on the same loader.
patch_elf() { "$work/deps/$loader" --library-path "$work/deps" "$work/root/usr/bin/patchelf" "$@"; }

# retarget makes the programs use the private loader and libraries. DT_RPATH, unlike DT_RUNPATH, holds for
# the libraries of a library too, unless that one has a RUNPATH of its own: so those have to go.
retarget() {
	say "pointing the programs at their own libraries"
	for program in "$work"/bin/llama-*; do
		# shellcheck disable=SC2016 # the loader fills in $ORIGIN
		patch_elf --set-interpreter "$engine/deps/$loader" \
			--force-rpath --set-rpath '$ORIGIN/../lib:$ORIGIN/../deps' "$program"
	done
	find "$work/lib" "$work/deps" "$work/bin" -type f -name '*.so*' ! -name "$loader" |
		while IFS= read -r library; do
			[ -z "$(patch_elf --print-rpath "$library")" ] || patch_elf --remove-rpath "$library"
		done
}

# describe_devices keeps every Vulkan driver's manifest, with the driver's path in it made absolute.
describe_devices() {
	icd=$work/share/vulkan/icd.d
	mkdir -p "$icd"
	for manifest in "$work"/root/usr/share/vulkan/icd.d/*.json; do
		escaped=$(printf '%s' "$engine/deps" | sed 's/[&|\\"]/\\&/g')
		sed "s|\(\"library_path\": *\"\)[^\"]*/*\(lib[^\"/]*\"\)|\1$escaped/\2|" "$manifest" \
			>"$icd/$(basename "$manifest")"
	done
	cat >"$work/vulkan.env" <<-ENV
		VK_DRIVER_FILES=$engine/share/vulkan/icd.d/lvp_icd.json
		GGML_VK_VISIBLE_DEVICES=0
	ENV
}

# put_in_place swaps the new engine for the old one.
put_in_place() {
	rm -f "$engine/.stamp"
	for part in bin lib deps share vulkan.env VERSION; do
		rm -rf "${engine:?}/$part"
		mv "$work/$part" "$engine/$part"
	done
}

# verify has every program's loader list the libraries it would take.
verify() {
	for program in "$engine"/bin/llama-*; do
		LD_TRACE_LOADED_OBJECTS=1 "$program" | sed -n 's/.* => //p' |
			ENGINE=$engine/ awk 'index($0, ENVIRON["ENGINE"]) != 1' >"$work/foreign"
		[ ! -s "$work/foreign" ] || die "$program takes libraries from the system:" \
			"$(tr '\n' ' ' <"$work/foreign"): report this with the contents of .engine/VERSION"
	done
	"$engine/bin/llama-server" --version >"$work/version" 2>&1 ||
		die "the engine does not start: $(tail -n 3 "$work/version")"
}

main() {
	mkdir -p "$engine"
	exec 9>"$engine/.lock"
	flock 9
	if up_to_date; then
		say "up to date in $engine"
		return
	fi
	need_tools
	work=$(mktemp -d "$engine/.work.XXXXXX")
	trap 'rm -rf "$work"' EXIT
	trap 'exit 130' HUP INT TERM
	download
	unpack
	arrange
	retarget
	describe_devices
	put_in_place
	verify
	stamp >"$engine/.stamp"
	say "ready in $engine ($(grep '^llama.cpp-tools ' "$engine/VERSION"))"
}

main
