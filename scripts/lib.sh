# shellcheck shell=bash
# What the scripts share: folders, colours, and steps that show progress and, on failure, their log.

set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."

export FAR_CACHE="${FAR_CACHE:-$HOME/.cache/far}"
# Outside the tree: a fresh clone finds its dependencies built.
export CARGO_TARGET_DIR="${CARGO_TARGET_DIR:-$FAR_CACHE/target}"
export CARGO_TERM_COLOR="${CARGO_TERM_COLOR:-never}"
PROFILE="${PROFILE:-release}"
LOGS="$FAR_CACHE/logs"
mkdir -p "$FAR_CACHE" "$LOGS"

# shellcheck disable=SC2034 # used by the scripts that source this
if [ -t 1 ] && [ -z "${NO_COLOR:-}" ]; then
	BOLD=$'\e[1m' RED=$'\e[31m' GREEN=$'\e[32m' YELLOW=$'\e[33m' PLAIN=$'\e[0m'
else
	BOLD='' RED='' GREEN='' YELLOW='' PLAIN=''
fi

say() { printf '%s\n' "$*"; }
warn() { printf '%s\n' "${YELLOW}$*${PLAIN}" >&2; }
die() {
	printf '%s\n' "${RED}$*${PLAIN}" >&2
	exit 1
}

# Where cargo puts the programs of a profile.
bin_dir() {
	case "$1" in
		dev) printf '%s\n' "$CARGO_TARGET_DIR/debug" ;;
		*) printf '%s\n' "$CARGO_TARGET_DIR/$1" ;;
	esac
}

# Says every few seconds how long a step has run: in place on a terminal, a line every 30 s elsewhere. Ends by itself
# when the script that started it is gone.
ticker() {
	local name=$1 start=$SECONDS parent=$$ every=30
	[ -t 1 ] && every=1
	# Without our output: a sleep left over must not keep a pipe open.
	while sleep "$every" >/dev/null 2>&1 && kill -0 "$parent" 2>/dev/null; do
		if [ -t 1 ]; then
			printf '\r  %s … %d s ' "$name" $((SECONDS - start))
		else
			printf '  %s … %d s\n' "$name" $((SECONDS - start))
		fi
	done
}

# step NAME COMMAND…: runs the command with its output in a log, with progress; on failure shows the log's end.
step() {
	local name=$1 start=$SECONDS code=0 ticker log
	shift
	log="$LOGS/$(printf '%s' "$name" | tr -c 'A-Za-z0-9\n' '-').log"
	[ -t 1 ] || say "  $name …"
	ticker "$name" &
	ticker=$!
	# In the foreground, so that Ctrl-C reaches it.
	"$@" >"$log" 2>&1 </dev/null || code=$?
	kill "$ticker" 2>/dev/null || true
	wait "$ticker" 2>/dev/null || true
	[ ! -t 1 ] || printf '\r\e[K'
	if [ "$code" -ne 0 ]; then
		say "${RED}✗ $name${PLAIN} ($((SECONDS - start)) s, exit code $code). The end of $log:"
		tail -n 40 "$log" | sed 's/^/    /'
		return "$code"
	fi
	say "${GREEN}✓${PLAIN} $name ($((SECONDS - start)) s)"
}

# Cargo takes for fresh what another clone built, with that clone's paths in it. Our own crates are built anew where the cache is
# another tree's; what they depend on stays.
# Called by what builds, before it does.
take_over_cache() {
	local mark="$CARGO_TARGET_DIR/tree" lock
	[ "$(cat "$mark" 2>/dev/null)" != "$PWD" ] || return 0
	for lock in "$CARGO_TARGET_DIR"/{*,*/*}/.cargo-lock; do
		# Cargo's own lock: not under the hands of a build.
		[ ! -e "$lock" ] || flock "$lock" rm -rf "${lock%/*}"/.fingerprint/{far,tiffany}-*
	done
	mkdir -p "$CARGO_TARGET_DIR"
	printf '%s\n' "$PWD" >"$mark"
}

# Whether the version $1 is at least $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

as_root() {
	if [ "$(id -u)" -eq 0 ]; then
		"$@"
	elif command -v sudo >/dev/null; then
		sudo -n "$@"
	else
		return 127
	fi
}

# Asks for sudo's password once, before any step hides the terminal.
may_install() {
	[ "$(id -u)" -eq 0 ] && return 0
	command -v sudo >/dev/null || return 1
	sudo -n true 2>/dev/null && return 0
	[ -t 0 ] && sudo -v -p "sudo password of %u, to install packages: "
}

apt() {
	as_root env DEBIAN_FRONTEND=noninteractive apt-get -q -o DPkg::Lock::Timeout=300 "$@"
}
