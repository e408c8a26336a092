# shellcheck shell=sh
# Packages of another Debian suite, without touching the system. To be sourced, by a script that has set
#
#   packages, suite    what to fetch, and from where
#   work               an empty folder
#
# and has say and die. Then `download` leaves the packages in $apt/archives.

# archives prints the address of each archive in the machine's configuration. It asks for what an update
# would fetch, because apt-get indextargets knows nothing before the first update.
archives() {
	apt-get -o Debug::NoLocking=1 update --print-uris |
		sed -n "s|^'\(.*/\)dists/[^']*/InRelease'.*|\1|p" | awk '!seen[$0]++'
}

# keyring URI prints the keyring that the machine's sources name for an archive, else Debian's own, else
# nothing.
keyring() {
	dir=/etc/apt
	eval "$(apt-config shell dir Dir::Etc/f)"
	find "$dir/sources.list" "$dir/sources.list.d" -type f -exec grep -lF "${1%/}" {} + \
		>"$work/sources" 2>/dev/null || :
	for ring in $(xargs -d '\n' -r sed -n 's/.*[Ss]igned-[Bb]y[=:] *\(\/[^] ]*\).*/\1/p' <"$work/sources") \
		/usr/share/keyrings/debian-archive-keyring.gpg; do
		if [ -r "$ring" ]; then
			printf '%s' "$ring"
			return
		fi
	done
}

# The machine's proxies and certificates stay in force; its preferences, what it has installed and
# what it does after an update do not.
write_apt_config() {
	apt-config dump | grep -v -e 'Post-Invoke' -e '^Dir::Etc::\(main\|parts\) ' >"$apt/apt.conf"
	cat >>"$apt/apt.conf" <<-CONF
		Dir::Etc::main "/dev/null";
		Dir::Etc::parts "/dev/null";
		Dir::Etc::sourcelist "$apt/sources.list";
		Dir::Etc::sourceparts "/dev/null";
		Dir::Etc::preferences "/dev/null";
		Dir::Etc::preferencesparts "/dev/null";
		Dir::State "$apt";
		Dir::State::lists "$apt/lists";
		Dir::State::status "$apt/status";
		Dir::Cache "$apt";
		Dir::Cache::archives "$apt/archives";
		Debug::NoLocking "1";
		APT::Sandbox::User "root";
		APT::Update::Error-Mode "any";
		Acquire::Languages "none";
		Acquire::Retries "3";
	CONF
	mkdir -p "$apt/lists/partial" "$apt/archives/partial"
	: >"$apt/status"
}

private_apt() { APT_CONFIG="$apt/apt.conf" apt-get -qq "$@" >>"$apt/log" 2>&1; }

# download_from URI KEYRING fetches the packages.
download_from() {
	printf 'deb [%s] %s %s main\n' "${2:+signed-by=$2}" "$1" "$suite" |
		sed 's/\[\] //' >"$apt/sources.list"
	# shellcheck disable=SC2086,SC2154 # a list of words, given by whoever sources this
	private_apt update &&
		private_apt install -y --download-only --no-install-recommends $packages
}

download() {
	: "${packages:?}" "${suite:?}" "${work:?}"
	apt=$work/apt
	mkdir "$apt"
	archives >"$work/archives"
	write_apt_config
	say "downloading from suite $suite"
	while read -r uri; do
		if download_from "$uri" "$(keyring "$uri")"; then return; fi
	done <"$work/archives"
	[ ! -s "$apt/log" ] || tail -n 5 "$apt/log" >&2
	[ -s "$work/archives" ] || die "apt has no archive configured: add a Debian archive to its sources"
	die "no configured archive gave the packages of suite $suite: check the network, or add a" \
		"Debian archive to apt's sources, and run this again"
}
