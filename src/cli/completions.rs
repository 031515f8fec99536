//! `tidegate completions SHELL`.

use clap::Args;
use clap_complete::Shell;

use super::{Context, Failure};

#[derive(Debug, Args)]
pub struct Arguments {
    /// bash, elvish, fish, powershell or zsh.
    shell: Shell,
}

pub fn run(context: &Context, command: &mut clap::Command, arguments: Arguments) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, command, "tidegate", &mut script);
    context.print(&String::from_utf8_lossy(&script))
}
