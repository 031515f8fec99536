//! `tidegate config defaults | schema | show`.

use clap::{Args, Subcommand};

use super::{Context, Failure};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Every key with its default, its meaning and what is allowed, as TOML.
    Defaults,
    /// The JSON schema, for editors.
    Schema,
    /// The effective configuration after all layers, secrets masked.
    Show,
}

pub fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    match arguments.what {
        What::Defaults => context.print(&crate::config::defaults::render()),
        What::Schema => context.print_json(crate::config::schema().as_json()),
        What::Show => {
            let loaded = context.load()?;
            if context.json {
                context.print_json(&crate::config::show::json(&loaded))
            } else {
                context.print(&crate::config::show::toml(&loaded))
            }
        }
    }
}
