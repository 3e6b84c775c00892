//! The files that a command line names: what is written is none of those that are read.

use std::path::PathBuf;
use std::sync::Mutex;

use clap::ArgMatches;
use qconv::convert::refuse_inputs;
use qconv::error::Result;

/// Arguments that name what is written; all other paths are read.
const OUTPUTS: [&str; 8] =
    ["output", "report", "csv", "plot", "save_recipe", "sensitivity", "sarif", "write_manifest"];

/// The paths of one command.
#[derive(Clone, Debug, Default)]
pub struct Given {
    inputs: Vec<PathBuf>,
    /// What `-o` names: a file, or a directory that files appear in.
    output: Vec<PathBuf>,
    /// What is written beside that.
    others: Vec<PathBuf>,
}

/// Of the command that runs.
static GIVEN: Mutex<Given> = Mutex::new(Given { inputs: Vec::new(), output: Vec::new(), others: Vec::new() });

impl Given {
    /// What was parsed, of the command at the end.
    pub fn of(mut matches: &ArgMatches) -> Self {
        while let Some((_, inner)) = matches.subcommand() {
            matches = inner;
        }
        let mut given = Self::default();
        for id in matches.ids().map(clap::Id::as_str) {
            let plain = matches.try_get_many::<PathBuf>(id).ok().flatten().into_iter().flatten();
            let scaled = matches.try_get_many::<(PathBuf, f32)>(id).ok().flatten().into_iter().flatten();
            let paths = plain.chain(scaled.map(|(path, _)| path)).cloned();
            match id {
                "output" => given.output.extend(paths),
                _ if OUTPUTS.contains(&id) => given.others.extend(paths.filter(|p| p.as_os_str() != "-")),
                _ => given.inputs.extend(paths),
            }
        }
        given
    }

    /// Refuses outputs that are inputs, or each other; from now on [`check`] knows of these.
    ///
    /// # Errors
    /// `Misuse` naming the file.
    pub fn enter(self) -> Result<()> {
        let outputs: Vec<_> = self.output.iter().chain(&self.others).cloned().collect();
        refuse_inputs(&outputs, &self.inputs)?;
        *GIVEN.lock().unwrap_or_else(|e| e.into_inner()) = self;
        Ok(())
    }
}

/// Refuses files that are to be written where they are inputs, or what else the command writes.
///
/// # Errors
/// `Misuse` naming the file.
pub fn check(outputs: &[PathBuf]) -> Result<()> {
    let Given { inputs, others, .. } = GIVEN.lock().unwrap_or_else(|e| e.into_inner()).clone();
    refuse_inputs(&[outputs, &others].concat(), &inputs)
}
