#!/bin/sh
# Fuzzes all targets, or those named, for so many seconds each, JOBS at a time, and says what came of it:
#
#     fuzz/run.sh SECONDS JOBS [TARGET...]
#
# FUZZ_PROGRAM   a program that was built before; without it, it is built (see build.sh)
# FUZZ_ROOT      where the repository's seeds are: its root, which is the default
# FUZZ_OUT       where corpora, findings, logs and the summary go: $CARGO_TARGET_DIR/fuzz
# FUZZ_OPTIONS   more options of libFuzzer, such as -runs=100000
#
# A target that fails goes on with the next seed of libFuzzer's random numbers, until its time is over. The first
# number is 1: with -runs the same program does the same. Exit status: 0, 1 for findings, 2 for what could not be run.
set -eu
here=$(cd "$(dirname "$0")" && pwd)

# One target, as this script calls itself.
if [ "${1:-}" = --one ]; then
    target=$2 seconds=$3
    log=$FUZZ_OUT/log/$target
    corpus=$FUZZ_OUT/corpus/$target
    mkdir -p "$corpus" "$FUZZ_OUT/findings"
    QCONV_FUZZ_DIR=$(mktemp -d "$FUZZ_FILES/XXXXXX")
    QCONV_FUZZ_TARGET=$target
    export QCONV_FUZZ_DIR QCONV_FUZZ_TARGET
    set -- "$corpus"
    beside=$("$FUZZ_PROGRAM" --list "$target" 2>/dev/null)
    for dir in "fuzz/corpus/$target" "fixtures/bugs/$target" $beside; do
        if [ -d "$FUZZ_ROOT/$dir" ]; then set -- "$@" "$FUZZ_ROOT/$dir"; fi
    done
    dictionary=$FUZZ_ROOT/fuzz/dictionaries/$target
    if [ -f "$dictionary" ]; then set -- "-dict=$dictionary" "$@"; fi
    : >"$log"
    begin=$(date +%s)
    seed=1
    while :; do
        left=$((seconds - $(date +%s) + begin))
        [ "$left" -gt 0 ] || break
        status=0
        # shellcheck disable=SC2086 # several options
        "$FUZZ_PROGRAM" -seed=$seed "-max_total_time=$left" -timeout=25 -report_slow_units=25 -rss_limit_mb=2048 -print_final_stats=1 \
            -verbosity=1 -close_fd_mask=1 -artifact_prefix="$FUZZ_OUT/findings/$target-" ${FUZZ_OPTIONS:-} "$@" \
            >>"$log" 2>&1 || status=$?
        [ "$status" -ne 0 ] || break
        seed=$((seed + 1))
        [ $seed -le 50 ] || break
    done
    rm -rf "$QCONV_FUZZ_DIR"
    exit 0
fi

if [ $# -lt 2 ]; then
    sed -n '2,/^set/s/^# \{0,1\}//p' "$0" | sed '$d' >&2
    exit 2
fi
seconds=$1 jobs=$2
shift 2
FUZZ_ROOT=${FUZZ_ROOT:-$(dirname "$here")}
FUZZ_OUT=${FUZZ_OUT:-${CARGO_TARGET_DIR:-$FUZZ_ROOT/target}/fuzz}
FUZZ_PROGRAM=${FUZZ_PROGRAM:-$("$here/build.sh")}
FUZZ_FILES=$(mktemp -d "$(if [ -w /dev/shm ]; then echo /dev/shm; else echo "${TMPDIR:-/tmp}"; fi)/qconv-fuzz-XXXXXX")
trap 'rm -rf "$FUZZ_FILES"' EXIT
trap 'exit 2' INT TERM
export FUZZ_ROOT FUZZ_OUT FUZZ_PROGRAM FUZZ_FILES
mkdir -p "$FUZZ_OUT/log"
all=$("$FUZZ_PROGRAM" --list 2>/dev/null)
for target in "$@"; do
    echo "$all" | grep -qx "$target" || { echo "$target is no target" >&2; exit 2; }
done
[ $# -gt 0 ] || set -- $all
begin=$(date +%s)
printf '%s\n' "$@" | xargs -P "$jobs" -I TARGET "$here/run.sh" --one TARGET "$seconds"

{
    printf '%-18s %12s %8s %8s %8s %9s\n' target executions per_s coverage corpus findings
    for target in "$@"; do
        awk -v target="$target" '
            /^stat::number_of_executed_units/ { runs += $2 }
            /^stat::new_units_added/ { added += $2 }
            /^SUMMARY|^==[0-9]+== ?ERROR|^ERROR: libFuzzer/ { if (!/SUMMARY/) findings++ }
            match($0, /cov: [0-9]+/) { cov = substr($0, RSTART + 5, RLENGTH - 5) }
            match($0, /corp: [0-9]+/) { corp = substr($0, RSTART + 6, RLENGTH - 6) }
            /^Done [0-9]+ runs in [0-9]+ second/ { took += $5 }
            END { printf "%-18s %12d %8d %8d %8d %9d\n", target, runs, runs / (took > 0 ? took : '"$seconds"'), cov, corp, findings }
        ' "$FUZZ_OUT/log/$target"
    done
} >"$FUZZ_OUT/targets"
awk -v seconds="$(($(date +%s) - begin))" '
    { print }
    NR > 1 { runs += $2; findings += $6; n++; if ($2 == 0) idle = idle " " $1 }
    END {
        printf "%d targets, %d executions in %d s, %d findings\n", n, runs, seconds, findings
        if (idle != "") printf "not run:%s\n", idle
    }' "$FUZZ_OUT/targets" >"$FUZZ_OUT/summary"
rm "$FUZZ_OUT/targets"
cat "$FUZZ_OUT/summary"
! grep -q '^not run' "$FUZZ_OUT/summary" || exit 2
grep -q ' 0 findings$' "$FUZZ_OUT/summary" || { echo "findings are in $FUZZ_OUT/findings" >&2; exit 1; }
