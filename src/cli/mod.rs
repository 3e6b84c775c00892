//! The command line: one file per command. Data goes to stdout, everything else to stderr.
//! Exit codes: 0 done, 1 a check failed, 2 it could not be done.

mod beforehand;
#[cfg(feature = "ggml")]
mod bench;
#[cfg(feature = "ggml")]
mod calibrate;
#[cfg(feature = "ggml")]
mod calibration;
mod common;
mod compare;
mod completions;
mod config;
mod convert;
mod coreml_to_hf;
mod diff;
#[cfg(feature = "ggml")]
mod embed;
mod eval;
mod gguf_to_hf;
mod given;
mod hf_to_gguf;
mod imatrix;
mod inspect;
mod interrupt;
mod limits;
mod lora_to_gguf;
mod mix;
mod pack;
mod quantize;
mod quantizer;
mod report;
mod run;
mod runnable;
mod scan;
mod split;
mod talk;
mod to_coreml;
mod to_hf;
mod ui;
mod unpack;
mod verify;

use std::process::ExitCode;

use clap::{CommandFactory, FromArgMatches, Parser, Subcommand};
use qconv::limits::Limits;

use self::given::Given;

/// Convert, quantize, inspect, verify and run language-model files
#[derive(Parser)]
#[command(name = "qconv", max_term_width = 100, subcommand_required = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,

    #[command(flatten)]
    limits: limits::LimitArgs,
}

#[derive(Subcommand)]
enum Command {
    HfToGguf(hf_to_gguf::Args),
    GgufToHf(gguf_to_hf::Args),
    Convert(convert::Args),
    HfToCoreml(to_coreml::HfArgs),
    GgufToCoreml(to_coreml::GgufArgs),
    CoremlToHf(coreml_to_hf::Args),
    Pack(pack::Args),
    Unpack(unpack::Args),
    LoraToGguf(lora_to_gguf::Args),
    Quantize(quantize::Args),
    Imatrix(imatrix::Args),
    Split(split::SplitArgs),
    Merge(split::MergeArgs),
    Inspect(inspect::Args),
    Verify(verify::Args),
    Diff(diff::Args),
    Run(run::Args),
    #[cfg(feature = "ggml")]
    Embed(embed::Args),
    Eval(eval::Args),
    #[cfg(feature = "ggml")]
    Bench(bench::Args),
    #[cfg(feature = "ggml")]
    Calibrate(calibrate::Args),
    Completions(completions::Args),
}

/// How a command that could be carried out ended.
pub enum Status {
    /// As wished.
    Done,
    /// A check found something.
    Findings,
}

/// The clap command.
fn command() -> clap::Command {
    let version = clap::Arg::new("version")
        .short('V')
        .long("version")
        .action(clap::ArgAction::Version)
        .global(false)
        .help("Print the version, and that of the linked ggml with its backends");
    let command = Cli::command().version(env!("CARGO_PKG_VERSION"));
    config::with_option(command.disable_version_flag(true).arg(version))
}

fn version() -> String {
    let own = env!("CARGO_PKG_VERSION");
    #[cfg(feature = "ggml")]
    {
        match qconv::ggml::linked() {
            Ok(linked) => {
                let backends: Vec<_> = linked.backends.iter().map(|(name, _)| name.as_str()).collect();
                let commit = match linked.ggml_commit.as_str() {
                    "unknown" => String::new(),
                    commit => format!(" ({commit})"),
                };
                format!(
                    "{own}\nggml {}{commit}, llama.cpp {}\nbackends: {}\n{}",
                    linked.ggml_version,
                    linked.llama_version,
                    backends.join(", "),
                    linked.system_info
                )
            }
            Err(e) => format!("{own}\nggml: {e}"),
        }
    }
    #[cfg(not(feature = "ggml"))]
    format!("{own}\nbuilt without ggml")
}

/// Parses and runs.
pub fn main() -> ExitCode {
    interrupt::limits_are_errors();
    // The version asks the linked library, which is not worth it for anything else.
    let wants_version = std::env::args_os().skip(1).any(|a| a == "--version" || a == "-V");
    let command = if wants_version { command().long_version(version()) } else { command() };
    let lines = match config::expand(command.clone(), std::env::args_os().collect()) {
        Ok(lines) => lines,
        Err(e) => return failed(&e.into()),
    };
    // What is wrong with any shall show before the first begins.
    let mut commands = Vec::with_capacity(lines.len());
    for line in lines {
        match command
            .clone()
            .try_get_matches_from(line)
            .and_then(|m| Ok((Given::of(&m), Cli::from_arg_matches(&m)?)))
        {
            Ok((given, cli)) => {
                let mut limits = cli.limits.limits();
                // Its own option of this name is about what it writes.
                if matches!(cli.command, Command::Split(_)) {
                    limits.tensors = Limits::STANDARD.tensors;
                }
                commands.push((limits, given, cli.command));
            }
            Err(e) => e.exit(),
        }
    }
    let (mut code, count) = (ExitCode::SUCCESS, commands.len());
    for (number, (limits, given, command)) in (1..).zip(commands) {
        // For all that a command opens on its way, deep down too.
        Limits::set_default(limits);
        match given.enter().map_err(anyhow::Error::from).and_then(|()| run(command)) {
            Ok(Status::Done) => {}
            Ok(Status::Findings) => code = ExitCode::from(1),
            Err(e) if is_broken_pipe(&e) => return code,
            Err(e) => {
                if count > 1 {
                    ui::say(&format!(
                        "model {number} of {count} could not be made, later ones were not begun"
                    ));
                }
                return failed(&e);
            }
        }
    }
    code
}

fn failed(e: &anyhow::Error) -> ExitCode {
    ui::error(e);
    ExitCode::from(2)
}

fn run(command: Command) -> anyhow::Result<Status> {
    match command {
        Command::HfToGguf(args) => hf_to_gguf::run(&args),
        Command::GgufToHf(args) => gguf_to_hf::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::HfToCoreml(args) => to_coreml::from_hf(&args),
        Command::GgufToCoreml(args) => to_coreml::from_gguf(&args),
        Command::CoremlToHf(args) => coreml_to_hf::run(&args),
        Command::Pack(args) => pack::run(&args),
        Command::Unpack(args) => unpack::run(args),
        Command::LoraToGguf(args) => lora_to_gguf::run(&args),
        Command::Quantize(args) => quantize::run(&args),
        Command::Imatrix(args) => imatrix::run(&args).map(|()| Status::Done),
        Command::Split(args) => split::split(&args),
        Command::Merge(args) => split::merge(&args),
        Command::Inspect(args) => inspect::run(&args).map(|()| Status::Done),
        Command::Verify(args) => verify::run(&args),
        Command::Diff(args) => diff::run(&args),
        Command::Run(args) => run::run(&args, ui::catch_interrupt()).map(|()| Status::Done),
        #[cfg(feature = "ggml")]
        Command::Embed(args) => embed::run(&args).map(|()| Status::Done),
        #[cfg(feature = "ggml")]
        Command::Bench(args) => bench::run(&args).map(|()| Status::Done),
        Command::Eval(args) => eval::run(&args).map(|()| Status::Done),
        #[cfg(feature = "ggml")]
        Command::Calibrate(args) => calibrate::run(&args).map(|()| Status::Done),
        Command::Completions(args) => completions::run(&args).map(|()| Status::Done),
    }
}

/// A reader such as `head` has seen enough.
fn is_broken_pipe(e: &anyhow::Error) -> bool {
    e.chain()
        .filter_map(|c| c.downcast_ref::<std::io::Error>())
        .any(|e| e.kind() == std::io::ErrorKind::BrokenPipe)
}
