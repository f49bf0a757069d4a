//! samara: the user's tool.
//!
//! One file a group of verbs, each a function from parsed arguments to a result; this file parses, calls and reports.
//! Everything that is printed goes through [`output`].
//!
//! Exit statuses: 0 done, 1 failed or found damaged, 2 wrong usage.

mod capsule;
mod containers;
mod output;

use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use output::Output;

/// Saves running containers, and brings them back.
#[derive(Debug, Parser)]
#[command(name = "samara", version, propagate_version = true, max_term_width = 100)]
struct Arguments {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    json: bool,
    /// Read this node configuration instead of /etc/samara/config.toml
    #[arg(long, global = true, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// List the containers that run here under samara-runtime
    Ps(containers::Ps),
    /// Save a running container
    Save(containers::Save),
    /// Look at capsules in object storage, check, copy and remove them
    #[command(subcommand)]
    Capsule(capsule::Verb),
}

fn main() -> ExitCode {
    let Arguments { json, config, verb } = Arguments::parse();
    let mut output = Output::new(json);
    let result: Result<(), Box<dyn Error>> = match verb {
        Verb::Ps(ps) => containers::ps(&ps, &mut output).map_err(Into::into),
        Verb::Save(save) => containers::save(&save, config, &mut output).map_err(Into::into),
        Verb::Capsule(verb) => {
            capsule::run(verb, config.as_deref(), &mut output).map_err(Into::into)
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            output.error(&*error);
            ExitCode::FAILURE
        }
    }
}
