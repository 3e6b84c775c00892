//! Files that lie, and such as only look as if they did: one row each, with what comes of it.
//! The classes are those of published faults of other readers; `SECURITY.md` has the table.
#![allow(dead_code)] // each test uses its part

pub mod gguf;
pub mod index;
pub mod model;
pub mod safetensors;
pub mod tensor;

use qconv::ErrorKind;

use crate::raw::Raw;

/// What an attempt comes to.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// It succeeds.
    Fine,
    /// It fails with this kind of error, whose message has these words.
    Refused(ErrorKind, String),
}

/// One file.
pub struct Case {
    pub name: String,
    pub bytes: Vec<u8>,
    /// Of the reader, and so of `inspect`.
    pub opened: Outcome,
    /// Of what makes another file of it: `quantize`, or `hf-to-gguf`.
    pub used: Outcome,
    /// Where the format's specification is silent or readers differ: how the page below `formats/spec` begins
    /// the line that has the decision.
    pub policy: Option<&'static str>,
}

impl Case {
    /// Marks a decision.
    pub fn policy(&mut self, line: &'static str) {
        self.policy = Some(line);
    }

    /// It is read, and then not used.
    pub fn but(&mut self, kind: ErrorKind, says: &str) -> &mut Self {
        self.used = Outcome::Refused(kind, says.into());
        self
    }
}

/// A table of files.
#[derive(Default)]
pub struct Cases(pub Vec<Case>);

impl Cases {
    /// A file that is read and used.
    pub fn read(&mut self, name: &str, bytes: impl Bytes) -> &mut Case {
        self.add(name, bytes, Outcome::Fine)
    }

    /// A file that is not opened.
    pub fn refuse(&mut self, name: &str, bytes: impl Bytes, kind: ErrorKind, says: &str) -> &mut Case {
        self.add(name, bytes, Outcome::Refused(kind, says.into()))
    }

    fn add(&mut self, name: &str, bytes: impl Bytes, outcome: Outcome) -> &mut Case {
        assert!(self.0.iter().all(|c| c.name != name), "{name} is there twice");
        let (name, bytes) = (name.to_string(), bytes.bytes());
        self.0.push(Case { name, bytes, opened: outcome.clone(), used: outcome, policy: None });
        self.0.last_mut().unwrap()
    }
}

/// What a row may give as the file.
pub trait Bytes {
    fn bytes(self) -> Vec<u8>;
}

impl Bytes for Raw {
    fn bytes(self) -> Vec<u8> {
        Raw::bytes(&self)
    }
}

impl Bytes for Vec<u8> {
    fn bytes(self) -> Vec<u8> {
        self
    }
}

impl Bytes for &[u8] {
    fn bytes(self) -> Vec<u8> {
        self.to_vec()
    }
}

/// All GGUF files.
pub fn all_gguf() -> Vec<Case> {
    let mut cases = Cases::default();
    gguf::containers(&mut cases);
    gguf::values(&mut cases);
    tensor::tensors(&mut cases);
    model::models(&mut cases);
    cases.0
}

/// What ends a zip archive without members.
pub fn end_of_zip() -> Vec<u8> {
    [b"PK\x05\x06".to_vec(), vec![0; 18]].concat()
}
