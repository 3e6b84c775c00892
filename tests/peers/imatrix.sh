#!/bin/sh
# Records what llama.cpp's imatrix tool makes of two fixtures in fixtures/imatrix.
#
#     tests/peers/imatrix.sh QCONV LLAMA_CPP_DIR TARGET_DIR
#
# LLAMA_CPP_DIR is the tree with tools/imatrix (PyPI's sdist of llama-cpp-python 0.3.36, vendor/llama.cpp).
# The tool is linked with the library that qconv in TARGET_DIR was linked with, because another build
# rounds otherwise: -O2 instead of -O3 is worth 3e-5. This compiles for some minutes.
set -e
qconv=$(realpath "$1"); theirs=$(realpath "$2"); target=$(realpath "$3")
fixtures=$(cd "$(dirname "$0")/../../fixtures" && pwd)
crate=$(ls -d "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/llama-cpp-sys-2-0.1.161/llama.cpp)
# Of several builds the one compiled as a release.
lib=$(dirname "$(grep -l 'CMAKE_BUILD_TYPE:STRING=Release$' "$target"/release/build/llama-cpp-sys-2-*/out/build/CMakeCache.txt | head -1)")/../lib
work=$(mktemp -d); cd "$work"
include="-I$crate/common -I$crate/include -I$crate/ggml/include -I$crate/src -I$crate/vendor -I$crate/vendor/cpp-httplib"
g++ -std=c++17 -O2 $include -c "$theirs/tools/imatrix/imatrix.cpp" -o imatrix.o
for f in $(find "$crate/common" "$crate/vendor/cpp-httplib" -name '*.cpp' ! -name llguidance.cpp); do
	g++ -std=c++17 -O0 $include -c "$f" -o "$(echo "$f" | tr / _).o"
done
cat > build.cpp <<'CPP'
#include <cstdio>
int llama_build_number() { return 0; }
const char *llama_commit() { return ""; }
const char *llama_compiler() { return ""; }
const char *llama_build_target() { return ""; }
const char *llama_build_info() { return ""; }
void llama_print_build_info(const char *, FILE *) {}
CPP
g++ -c build.cpp
g++ -o llama-imatrix ./*.o -Wl,--start-group "$lib"/libllama.a "$lib"/libggml*.a -Wl,--end-group -lpthread -ldl -lgomp
cp "$fixtures/tiny-llama/calibration.txt" .
for source in tiny-llama models/mixtral; do
	name=$(basename "$source")
	"$qconv" hf-to-gguf "$fixtures/$source" --type f32 -o "$name.f32" --no-verify -q
	./llama-imatrix -m "$name.f32" -f calibration.txt -o "$name.gguf" -c 512 -b 512 --chunks 4 -t 1 --process-output
	cp "$name.gguf" "$fixtures/imatrix/"
	# It may end before all of its lines are out: the longest of many tries is whole.
	for _ in $(seq 40); do
		./llama-imatrix -m "$name.f32" --in-file "$name.gguf" --show-statistics 2>&1 | grep '%	' |
			sed 's/^.*I  *\([-0-9][0-9]*\t\)/\1/' > try
		[ -f table ] && [ "$(wc -l < try)" -le "$(wc -l < table)" ] || mv try table
	done
	mv table "$fixtures/imatrix/$name.statistics"
done
rm -r "$work"
