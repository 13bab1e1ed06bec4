#!/usr/bin/env bash
# What continuous integration has no time for: the Rust tests on an emulated ARM processor (NEON), some watched by the
# address sanitizer of nightly Rust and one by Miri. All stop at the first error.
#
#     tools/deep_checks.sh arm|address|miri ...
#
# arm wants Debian's qemu-user-static, gcc-aarch64-linux-gnu and libc6-dev-arm64-cross, and
# `rustup target add aarch64-unknown-linux-gnu`; the others `rustup toolchain install nightly -c miri -c rust-src`.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ $# -gt 0 ] || { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' tools/deep_checks.sh >&2; exit 2; }
for check in "$@"; do
    case $check in
    arm | address | miri) ;;
    *)
        echo "no check is named $check: arm, address, miri" >&2
        exit 2
        ;;
    esac
done

host=$(rustc -vV | sed -n 's/^host: //p')

for check in "$@"; do
    printf '\n=== %s\n' "$check"
    case $check in
    arm)
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc \
        CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu" \
            cargo test --release --target aarch64-unknown-linux-gnu --lib --tests
        ;;
    address)
        # The tests of kernels and operations had not compiled after half an hour. That of too little memory asks for
        # more than it allows.
        ASAN_OPTIONS=allocator_may_return_null=1 RUSTFLAGS=-Zsanitizer=address \
            CARGO_PROFILE_RELEASE_OPT_LEVEL=1 CARGO_PROFILE_RELEASE_LTO=off \
            cargo +nightly test --release --target "$host" --lib \
            --test blocked --test net --test product
        ;;
    miri)
        # Of its own processors Miri knows AVX2 best; it unmaps no part of a mapping, as the allocator's tests do.
        for isa in portable avx2; do
            features=$([ "$isa" = portable ] || echo -Ctarget-feature=+avx2,+fma,+f16c)
            XUNIT_ISA=$isa RUSTFLAGS=$features \
                MIRIFLAGS="-Zmiri-disable-isolation -Zmiri-ignore-leaks" \
                cargo +nightly miri test --test ops -- tiny_tensors
        done
        ;;
    esac
done
