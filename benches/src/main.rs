//! The benchmark suite of `docs/benchmarks.md`.

fn main() {}
