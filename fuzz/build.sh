#!/bin/sh
# Builds the program that run.sh runs, and prints where it is. Exit status 3 where it cannot be built: it needs a C++
# compiler, and an x86-64 or aarch64 Linux.
set -eu
cd "$(dirname "$0")"
target=${CARGO_TARGET_DIR:-$(dirname "$PWD")/target}
case $(uname -sm) in
'Linux x86_64' | 'Linux aarch64') ;;
*) echo "fuzzing is left out: libFuzzer is built on Linux only, this is $(uname -sm)" >&2; exit 3 ;;
esac
command -v c++ >/dev/null || command -v g++ >/dev/null || {
    echo 'fuzzing is left out: there is no C++ compiler, which libFuzzer needs' >&2; exit 3;
}
RUSTC_WRAPPER=$PWD/instrument.sh CARGO_TARGET_DIR=$target \
    "${CARGO:-cargo}" build --release --locked --bin all ${FUZZ_CARGO_OPTIONS:-} >&2
echo "$target/release/all"
