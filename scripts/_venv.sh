# Sourced by the scripts beside it: finds a Python, and keeps the project's own environment in .venv.
#
#   find_python        sets PYTHON to an interpreter that is new enough, or explains and exits
#   make_venv DIR      makes an empty virtual environment with pip in it
#   ready_venv LEVEL   makes .venv/bin/python ready; LEVEL is `run` (the program) or `test` (tests and linters too)
#
# Everything these functions say goes to stderr: a caller's stdout is its own.
# Environment: PYTHON=/path/to/python chooses the interpreter.

say() { printf '%s\n' "$*" >&2; }
fail() { say "error: $*"; exit 1; }

# A script's own opening comment is its help text.
usage() { awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"; }

_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        _new_enough "$PYTHON" || fail "PYTHON=$PYTHON is not a working Python 3.11 or newer"
        return
    fi
    local candidate version found=""
    for candidate in python3 python3.14 python3.13 python3.12 python3.11 python; do
        command -v "$candidate" >/dev/null 2>&1 || continue
        if _new_enough "$candidate"; then
            PYTHON=$candidate
            return
        fi
        # A version manager's shim may be on PATH with nothing behind it: it prints no version then.
        version=$("$candidate" -c 'import platform; print(platform.python_version())' 2>/dev/null) || continue
        found="$found${found:+, }$version"
    done
    fail "Python 3.11 or newer is needed${found:+ (found: $found)}; install one, or name it: PYTHON=/path/to/python3 $0"
}

# Some systems (Debian, Ubuntu) split ensurepip off. pip itself can put pip into an empty environment.
make_venv() {
    local where=$1 advice="on Debian or Ubuntu: apt install python3-venv"
    find_python
    if "$PYTHON" -c 'import ensurepip, venv' >/dev/null 2>&1; then
        "$PYTHON" -m venv --clear "$where" >&2 || fail "$PYTHON could not make $where"
    elif "$PYTHON" -c 'import pip, venv' >/dev/null 2>&1; then
        "$PYTHON" -m venv --clear --without-pip "$where" >&2 || fail "$PYTHON could not make $where"
        "$PYTHON" -m pip --python "$where/bin/python" install --quiet --disable-pip-version-check pip >&2 ||
            fail "$PYTHON has no ensurepip, and its pip could not fill $where; $advice"
    else
        fail "$PYTHON can't make virtual environments: it has neither ensurepip nor pip; $advice"
    fi
}

# What an installed .venv depends on: a change in any of it installs again.
_venv_wants() {
    { cat pyproject.toml constraints.txt && .venv/bin/python -c 'import sys; print(sys.version, sys.prefix)'; } | cksum
}

ready_venv() {
    local level=$1 wanted target=. stamp quiet=(--quiet)
    if ! { _new_enough .venv/bin/python && .venv/bin/python -c 'import pip' 2>/dev/null; }; then
        say "making .venv"
        make_venv .venv
    fi
    wanted=$(_venv_wants)
    for stamp in .venv/.llamesh-"$level" .venv/.llamesh-test; do # what tests need includes what running needs
        [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && return
    done
    # Tests run where somebody reads logs; who runs the program wants to see the program.
    [ "$level" = test ] && target='.[test]' && quiet=()
    say "installing into .venv (a minute or two the first time)"
    .venv/bin/python -m pip install ${quiet[@]+"${quiet[@]}"} --disable-pip-version-check -e "$target" -c constraints.txt >&2 ||
        fail "pip could not install; the reason is above. Run this again when it is put right: what was fetched is kept"
    printf '%s\n' "$wanted" >".venv/.llamesh-$level"
}
