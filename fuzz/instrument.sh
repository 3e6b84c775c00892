#!/bin/sh
# cargo's RUSTC_WRAPPER for fuzzing: the compiler, with coverage for libFuzzer in qconv and in what is fuzzed, and in
# nothing else. So dependencies are those of the ordinary build, and are not compiled again.
#
# These are ordinary code generation options, which work with a stable compiler; `cargo fuzz` gives the same to all
# crates with a nightly one.
set -eu
rustc=$1
shift
name=
previous=
for argument in "$@"; do
    [ "$previous" != --crate-name ] || name=$argument
    previous=$argument
done
case $name in
qconv | qconv_fuzz | all)
    exec "$rustc" "$@" --cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
        -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
        -Cllvm-args=-sanitizer-coverage-trace-compares
    ;;
*) exec "$rustc" "$@" ;;
esac
