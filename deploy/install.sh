#!/bin/sh
# Installs llamesh as a service of this machine: a Python environment of its own, configuration, a service that starts
# at boot. Running it again updates what is there and keeps configuration and state. On Debian and Ubuntu the
# package that scripts/build_deb makes does the same, and is removed more easily.
#
#   sudo deploy/install.sh [--from SOURCE] [--prefix FOLDER] [--no-start] [-- OPTIONS OF PIP]
#   sudo deploy/install.sh --uninstall [--prefix FOLDER]
#
#   --from SOURCE     what pip installs: a folder, a wheel, or a name on the package index (default: this checkout)
#   --prefix FOLDER   where the program goes (default: /opt/llamesh; on macOS ~/Library/Application Support/llamesh)
#   --no-start        install, but neither enable nor start the service
#   --uninstall       stop the service and remove the program; configuration and state stay
#   -- ...            for pip, such as: -- --no-index --find-links wheels (a closed network)
#
# PYTHON=/path/to/python3 chooses the interpreter (3.11 or newer). Linux: systemd, the user llamesh, as root.
# macOS: a launch agent of the user who runs it, without root.
set -eu

here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
checkout=$(dirname -- "$here")

say() { printf '%s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"; }

source=$checkout prefix='' start=yes uninstall=no
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help)
        usage
        exit
        ;;
    --from | --prefix)
        if [ -z "${2:-}" ]; then fail "$1 needs a value"; fi
        if [ "$1" = --from ]; then source=$2; else prefix=$2; fi
        shift
        ;;
    --no-start) start=no ;;
    --uninstall) uninstall=yes ;;
    --)
        shift
        break
        ;;
    *) fail "unknown option $1; see $0 --help" ;;
    esac
    shift
done

system=$(uname -s)
case "$system" in
Linux)
    config=/etc/llamesh state=/var/lib/llamesh units=/etc/systemd/system command=/usr/local/bin/llamesh
    : "${prefix:=/opt/llamesh}"
    [ "$(id -u)" = 0 ] || fail "run it as root: it makes a user and a service"
    command -v systemctl >/dev/null 2>&1 ||
        fail "this system has no systemd; install the command with pip, and start it by what the system has"
    # Two owners of one installation would undo each other.
    if command -v dpkg-query >/dev/null 2>&1 && dpkg-query -W -f '${Status}' llamesh 2>/dev/null | grep -q ' installed$'; then
        fail "the Debian package llamesh is installed; update that, or remove it first: apt remove llamesh"
    fi
    ;;
Darwin)
    [ "$(id -u)" != 0 ] || fail "on macOS run it as yourself, not as root: the node runs as you"
    : "${prefix:=$HOME/Library/Application Support/llamesh}"
    config=$HOME/.config/llamesh state=$HOME/.local/state/llamesh logs=$HOME/Library/Logs/llamesh
    agents=$HOME/Library/LaunchAgents command=$HOME/.local/bin/llamesh label=org.llamesh.node
    ;;
*) fail "$system isn't supported; Linux with systemd and macOS are" ;;
esac
case "$prefix" in
/) fail "--prefix / would be all of the system" ;;
*[!A-Za-z0-9/._+\ -]*) fail "--prefix may hold letters, digits and / . _ + - only, not: $prefix" ;;
*\ *) [ "$system" = Darwin ] || fail "--prefix may hold no spaces, not: $prefix" ;;
/*) ;;
*) fail "--prefix must begin with /, not: $prefix" ;;
esac

running() { [ -d /run/systemd/system ]; } # not in a container's build, nor in a chroot

# A folder that we made has our mark: nothing else is ever replaced or removed.
mark=$prefix/.llamesh-install
if [ -e "$prefix" ] && [ ! -e "$mark" ] && [ -n "$(ls -A "$prefix" 2>/dev/null)" ]; then
    fail "$prefix is there and wasn't made by this script; choose another --prefix"
fi

if [ "$uninstall" = yes ]; then
    if [ "$system" = Linux ]; then
        if running; then systemctl stop llamesh.socket llamesh-peers.socket llamesh.service 2>/dev/null || true; fi
        for unit in llamesh.service llamesh.socket llamesh-peers.socket; do
            systemctl disable --quiet "$unit" 2>/dev/null || true
            rm -f "$units/$unit"
        done
        if running; then systemctl daemon-reload; fi
    else
        launchctl bootout "gui/$(id -u)/$label" 2>/dev/null || true
        rm -f "$agents/$label.plist"
    fi
    if [ -L "$command" ] && [ "$(readlink "$command")" = "$prefix/bin/llamesh" ]; then rm -f "$command"; fi
    rm -rf "$prefix"
    say "removed; configuration is left in $config, state and keys in $state"
    exit
fi

# The source is named by whoever runs this. A name for the index may not be an option of pip.
case "$source" in -*) fail "--from needs a folder, a wheel or a name, not: $source" ;; esac
constraints=
if [ -f "$checkout/constraints.txt" ] && [ -f "$checkout/pyproject.toml" ]; then
    constraints=$checkout/constraints.txt
elif [ "$source" = "$checkout" ]; then
    fail "$checkout isn't a checkout of llamesh; say what to install: --from"
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.11 or newer is needed; install one, or name it: PYTHON=/path/to/python3 $0"
"$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
    fail "$python can't make virtual environments; on Debian or Ubuntu: apt install python3-venv"

# 1. The program. The new one is made beside the old one, so that a failure leaves the old one as it was.
say "installing into $prefix"
umask 022
mkdir -p "$(dirname -- "$prefix")"
new=$prefix.new old=$prefix.old
rm -rf "$new" "$old"
trap 'rm -rf "$new"' EXIT
trap 'exit 130' INT TERM
"$python" -m venv "$new"
"$new/bin/python" -m pip install --quiet --disable-pip-version-check ${constraints:+-c "$constraints"} "$@" "$source" ||
    fail "pip could not install $source; the reason is above. Nothing was changed"
"$new/bin/python" -I -c 'import llamesh' || fail "$source was installed, but has no llamesh in it"
cat >"$new/bin/llamesh" <<END
#!/bin/sh
exec "$prefix/bin/python" -I -m llamesh "\$@"
END
chmod 755 "$new/bin/llamesh"
# What else is there (pip, activate) names the folder that it was made in.
find "$new/bin" -mindepth 1 ! -name 'python*' ! -name llamesh -exec rm -f {} +
: >"$new/.llamesh-install"
[ ! -e "$prefix" ] || mv "$prefix" "$old"
mv "$new" "$prefix"
rm -rf "$old"

copy_once() { # FILE FOLDER MODE [OPTION...]: what is there is somebody's
    file=$1 folder=$2 mode=$3
    shift 3
    [ -e "$folder/$file" ] || install "$@" -m "$mode" "$here/etc/$file" "$folder/$file"
}

# 2. The service.
if [ "$system" = Linux ]; then
    getent group llamesh >/dev/null || groupadd --system llamesh
    getent passwd llamesh >/dev/null ||
        useradd --system --gid llamesh --home-dir "$state" --no-create-home --shell /usr/sbin/nologin llamesh
    # GPUs of AMD and Intel; those of NVIDIA are open to all.
    for group in render video; do
        if getent group "$group" >/dev/null; then usermod -a -G "$group" llamesh; fi
    done
    install -d -o llamesh -g llamesh -m 750 "$state"
    install -d -o root -g llamesh -m 2770 "$config"
    for file in config.yaml cookbook.yaml secrets.yaml; do copy_once "$file" "$config" 640 -g llamesh; done
    for unit in llamesh.service llamesh.socket llamesh-peers.socket; do
        sed "s#/opt/llamesh#$prefix#g" "$here/systemd/$unit" >"$units/.$unit.new"
        chmod 644 "$units/.$unit.new"
        mv "$units/.$unit.new" "$units/$unit"
    done
    if [ -L "$command" ] || [ ! -e "$command" ]; then ln -sfn "$prefix/bin/llamesh" "$command"; fi
    if running; then systemctl daemon-reload; fi
    if [ "$start" = yes ]; then
        systemctl enable --quiet llamesh.socket llamesh.service
        if running; then
            # The socket stays open while the node restarts: no client is refused.
            systemctl start llamesh.socket
            systemctl restart llamesh.service
        fi
    fi
    say "done. Models: $config/cookbook.yaml; settings: $config/config.yaml; log: journalctl -u llamesh"
else
    mkdir -p "$config" "$state" "$logs" "$agents" "$(dirname -- "$command")"
    chmod 700 "$config" "$state"
    for file in config.yaml cookbook.yaml; do copy_once "$file" "$config" 644; done
    copy_once secrets.yaml "$config" 600
    sed -e "s#@PREFIX@#$prefix#g" -e "s#@CONFIG@#$config#g" -e "s#@STATE@#$state#g" -e "s#@LOGS@#$logs#g" \
        "$here/launchd/$label.plist" >"$agents/$label.plist"
    ln -sfn "$prefix/bin/llamesh" "$command"
    if [ "$start" = yes ]; then
        launchctl bootout "gui/$(id -u)/$label" 2>/dev/null || true
        launchctl bootstrap "gui/$(id -u)" "$agents/$label.plist"
    fi
    say "done. Models: $config/cookbook.yaml; settings: $config/config.yaml; log: $logs/llamesh.log"
fi
