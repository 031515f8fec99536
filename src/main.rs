//! The `tidegate` command.

/// All threads share one lock in musl's own allocator. Without huge pages, which would be 14 MB for the 1 MB that an idle gateway holds.
#[cfg(target_env = "musl")]
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> std::process::ExitCode {
    tidegate::cli::main()
}
