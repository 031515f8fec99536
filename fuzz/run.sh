#!/bin/bash
# Builds every fuzz target for libFuzzer with the stable toolchain and runs each for FUZZ_SECONDS (8), or those named.
#
#   fuzz/run.sh                       all, briefly: the gate `./ci.sh fuzz`
#   FUZZ_SECONDS=600 fuzz/run.sh mqtt_decode coap_message
#
# Seeds come from tests/data/TARGET, which is never written; what is found stays in fuzz/corpus/TARGET, and an input that
# breaks something in fuzz/artifacts/TARGET. Mend it, then move it to tests/data/TARGET. No AddressSanitizer: ADR 0080.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
seconds=${FUZZ_SECONDS:-8}
host=$(rustc -vV | sed -n 's/^host: //p')
out=${CARGO_TARGET_DIR:-$PWD/../target}/fuzz
# What `cargo fuzz` passes: edges counted inline, comparisons traced, so that libFuzzer learns magic numbers.
flags="--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4"
flags+=" -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table"
flags+=" -Cllvm-args=-sanitizer-coverage-trace-compares -Cllvm-args=-simplifycfg-branch-fold-threshold=0 -Ccodegen-units=16"

# With --target the flags reach neither build scripts nor procedural macros.
RUSTFLAGS="$flags" cargo build -q --release --locked --target "$host" --target-dir "$out"

[ $# -gt 0 ] || set -- $(sed -n 's/^path = "fuzz_targets\/\(.*\)\.rs"/\1/p' Cargo.toml)
broken=0
for name in "$@"; do
  mkdir -p "corpus/$name" "artifacts/$name"
  seeds=()
  [ ! -d "../tests/data/$name" ] || seeds=("../tests/data/$name")
  log=$out/$name.log
  if timeout $((seconds * 4 + 120)) "$out/$host/release/$name" "corpus/$name" "${seeds[@]}" -max_total_time="$seconds" \
    -timeout=10 -rss_limit_mb=1024 -max_len=65536 -artifact_prefix="artifacts/$name/" -print_final_stats=1 >"$log" 2>&1; then
    inputs=$(sed -n 's/^stat::number_of_executed_units: *//p' "$log")
    edges=$(sed -n 's/.* cov: \([0-9]*\) .*/\1/p' "$log" | tail -1)
    printf "fuzz: %-16s ok, %9s inputs in %s s, %s edges\n" "$name" "$inputs" "$seconds" "$edges"
  else
    tail -40 "$log"
    echo "fuzz: $name FAILED; the input is in fuzz/artifacts/$name"
    broken=$((broken + 1))
  fi
done
[ "$broken" = 0 ]
