//! `qconv completions`

use std::io::Write;

/// Print a completion script for a shell
#[derive(clap::Args, Debug)]
pub struct Args {
    /// bash, zsh, fish, elvish or powershell
    pub shell: clap_complete::Shell,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut super::command(), "qconv", &mut script);
    std::io::stdout().write_all(&script)?;
    Ok(())
}
