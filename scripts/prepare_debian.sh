#!/bin/sh
# Sees to what building needs: make, Python 3.11 with venv and headers, a C++ compiler. What is missing is installed where
# apt-get and the rights for it are there; otherwise one line names the packages. Prints the Python to use on stdout, all
# else on stderr. Fails only without Python, venv or make: the C++ module is optional.
#
# With --tests also to the emulators and the cross compiler with which tests/kernels runs the C++ kernels on other CPUs,
# and to the browser with which tests/studio uses the studio.
#
#   scripts/prepare_debian.sh [--tests] [PYTHON]
set -u
tests=""
if [ "${1:-}" = --tests ]; then
    tests=yes
    shift
fi
python=${1:-}

new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}
find_python() {
    for name in python3.11 python3.12 python3.13 python3.14 python3 python; do
        new_enough "$name" && echo "$name" && return
    done
}

has_venv() { "$python" -c 'import ensurepip, venv' 2>/dev/null; }
has_headers() {
    "$python" -c 'import os, sys, sysconfig
sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' 2>/dev/null
}
has_compiler() {
    for name in "${CXX:-c++}" g++ clang++; do
        command -v "${name%% *}" >/dev/null 2>&1 && return
    done
    return 1
}

# Sets to Debian packages `needed` (without these nothing works), `native` (without these there is no C++ module) and
# `for_tests` (without these some tests fail).
look() {
    needed="" native="" for_tests=""
    if [ -n "$tests" ]; then
        command -v qemu-x86_64 >/dev/null 2>&1 && command -v qemu-aarch64 >/dev/null 2>&1 || for_tests="qemu-user"
        command -v aarch64-linux-gnu-g++ >/dev/null 2>&1 || for_tests="$for_tests g++-aarch64-linux-gnu"
        command -v chromium >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1 || for_tests="$for_tests chromium"
        for_tests=${for_tests# }
    fi
    command -v make >/dev/null 2>&1 || needed="make"
    [ -n "$python" ] || python=$(find_python)
    if [ -z "$python" ]; then
        needed="$needed python3 python3-venv" native="python3-dev"
    else
        # Debian names the packages of each Python by its version, such as python3.11-venv.
        version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])' 2>/dev/null) || version=python3
        has_venv || needed="$needed $version-venv"
        has_headers || native="$version-dev"
    fi
    has_compiler || native="$native g++"
    needed=${needed# } native=${native# }
}

install() {
    command -v apt-get >/dev/null 2>&1 || return 1
    sudo=""
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null 2>&1 && sudo -n true 2>/dev/null || return 1
        sudo="sudo -n"
    fi
    echo "installing $* ..." >&2
    $sudo apt-get update -qq >&2
    # shellcheck disable=SC2086  # $sudo is empty or two words
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

if [ -n "$python" ] && ! new_enough "$python"; then
    echo "$python is not Python 3.11 or newer; give another one, or none to let linocut look for it" >&2
    exit 1
fi
look
if [ -n "$needed$native$for_tests" ]; then
    # shellcheck disable=SC2086  # lists of packages
    install $needed $native $for_tests || true
    look
fi
if [ -n "$needed" ]; then
    echo "linocut needs Python 3.11 or newer with venv, and make; on Debian: apt-get install $needed" \
        "(another Python: make PYTHON=/path/to/python3.11)" >&2
    exit 1
fi
if [ -n "$native" ]; then
    echo "going on without the C++ module, drawing is slower with the reference kernels;" \
        "to have it: apt-get install $native, then make clean and again" >&2
fi
if [ -n "$for_tests" ]; then
    echo "tests of the C++ kernels on other CPUs, or of the studio, will fail; to have them pass: apt-get install $for_tests" >&2
fi
echo "$python"
