//! `tidegate cache show | purge`: answers that routes keep.

use clap::{Args, Subcommand};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};

use super::admin_client::AdminClient;
use super::status::number;
use super::{Context, Failure, shown};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(subcommand)]
    command: CacheCommand,
}

#[derive(Debug, Subcommand)]
enum CacheCommand {
    /// How much is kept, in memory and on disk.
    Show,
    /// Forget the answers to a URL, so that the next request asks the upstream.
    Purge {
        /// As clients ask for it, such as http://gateway:1883/api/x?y; a path alone, such as /api/x, is meant for every host.
        url: String,
        /// Everything that begins with it.
        #[arg(long)]
        prefix: bool,
    },
}

pub fn run(context: &Context, arguments: &Arguments) -> Result<(), Failure> {
    let client = AdminClient::find(context)?;
    match &arguments.command {
        CacheCommand::Show => {
            let held = client.get("/cache").map_err(Failure::from)?;
            if context.json {
                return context.print_json(&held);
            }
            let line = |level: &str| {
                let (answers, bytes) = (number(&held["answers"][level]), number(&held["bytes"][level]));
                format!("{level:<7} {answers} answers, {}\n", shown::bytes(bytes))
            };
            context.print(&[line("memory"), line("disk")].concat())
        }
        CacheCommand::Purge { url, prefix } => {
            let url = utf8_percent_encode(url, NON_ALPHANUMERIC);
            let purged = client.delete(&format!("/cache?url={url}&prefix={prefix}")).map_err(Failure::from)?;
            if context.json {
                return context.print_json(&purged);
            }
            let count = |level: &str| number(&purged["purged"][level]);
            context.print(&format!("{} answers in memory and {} on disk purged\n", count("memory"), count("disk")))
        }
    }
}
