//! PyTorch checkpoints: `pytorch_model.bin`, whole or in shards, and files by any other name.
//! Layouts, opcodes and what is refused are described in `formats/spec/pytorch.md`. [`mod@write`] lays
//! out files of our own.
//!
//! A checkpoint is a pickle, a program for a machine that can call any function by name. Nothing
//! is called here: `machine` knows the few names and opcodes of state dicts, makes inert objects
//! of them, and refuses everything else by name. Tensors are ranges of the file, so that a
//! [`Store`] reads them like any other.

mod disassemble;
mod file;
mod globals;
mod machine;
mod pickle;
mod state_dict;
pub mod write;
mod zip;

pub use disassemble::{Instruction, Mention, mentions};
pub use file::is_pytorch;

use std::collections::HashMap;
use std::path::Path;

use serde_json::{Map, Value as Json};

use super::Store;
use super::shards::{Located, Naming};
use crate::error::{Error, Result};
use crate::limits::Limits;

/// What HQQ's own library calls its file.
pub const HQQ_FILE: &str = "qmodel.pt";

/// How the files are called.
pub const NAMING: Naming = Naming { format: "PyTorch", stem: "pytorch_model", suffix: "bin" };

/// Opens a file, an index, or a directory that holds either. Tensors come in the order of the
/// dict they are in, files in that of their names.
///
/// # Errors
/// `Io` when something cannot be read, `Unsupported` when a directory holds no weights, and for
/// pickles that hold more than dicts of tensors; `Malformed` and `Limit` as
/// `formats/spec/pytorch.md` lists.
pub fn open(path: &Path, limits: &Limits) -> Result<Store> {
    Ok(open_located(&NAMING.locate(path, limits)?, limits)?.0)
}

/// Opens the files that were found. A second result are the numbers and words beside the tensors, by
/// name, in files that have a dict for each module.
///
/// # Errors
/// As [`open`].
pub fn open_located(located: &Located, limits: &Limits) -> Result<(Store, Map<String, Json>)> {
    let (store, more) = located.open(limits, |input, number| {
        let contents = file::read(input, number, limits)?;
        Ok((contents.tensors, (contents.big_endian, contents.strided, contents.values)))
    })?;
    let big_endian = more.iter().any(|(big, ..)| *big);
    if big_endian && !more.iter().all(|(big, ..)| *big) {
        return Err(Error::unsupported("its shards are of both byte orders"));
    }
    let (mut strided, mut values) = (HashMap::new(), Map::new());
    for (_, of_file, said) in more {
        strided.extend(of_file);
        values.extend(said);
    }
    let store = store.with_strided(strided);
    Ok((if big_endian { store.into_big_endian() } else { store }, values))
}
