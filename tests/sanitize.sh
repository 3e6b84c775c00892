#!/bin/sh
# What `make sanitize` has cargo call in the place of rustc, for the crates of this repository alone: AddressSanitizer,
# which a stable compiler has behind this variable.
RUSTC_BOOTSTRAP=1 exec "$@" -Zsanitizer=address
