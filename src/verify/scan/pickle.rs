//! What pickles would call.

use std::path::Path;

use super::Scan;
use super::finding::Finding;
use super::rules::{PICKLE_GLOBAL, PICKLE_OPCODE};
use crate::container::InputFile;
use crate::container::pytorch::{Instruction, is_pytorch, mentions};
use crate::error::Result;
use crate::limits::Limits;

/// Whether Python could import it; names too long to be shown whole count.
fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Names all that the pickles of a file mention and tensors do not need. Whether there was such.
pub(super) fn check(scan: &mut Scan, path: &Path, limits: &Limits) -> Result<bool> {
    let file = InputFile::open(path)?;
    // Pickles of the first protocols begin with any byte: what does not parse as one may be something else.
    let is_one = is_pytorch(&file)?;
    let mut any = false;
    for mention in mentions(&file, limits)?.into_iter().filter(|m| !m.known) {
        // Bytes of anything else seldom make more of a name than that, and no pickle begins with it.
        let by_chance = match &mention.instruction {
            Instruction::Global(module, name) => !(is_name(module) && is_name(name)),
            Instruction::Hidden(_) => mention.offset == Some(0),
            Instruction::Broken(_) => true,
        };
        if !is_one && by_chance {
            continue;
        }
        let place = mention.member.as_ref().map_or(String::new(), |m| format!("{m}: "));
        let finding = match mention.instruction {
            Instruction::Global(module, name) => {
                let message = format!("{place}the pickle names {module}.{name}");
                let hint = "do not unpickle it; where the program is trusted, save the state dict alone, or as safetensors";
                Finding::new(&PICKLE_GLOBAL, path, message).key(&format!("{module}.{name}")).hint(hint)
            }
            Instruction::Hidden(what) => Finding::new(&PICKLE_OPCODE, path, format!("{place}{what}")),
            Instruction::Broken(what) => {
                Finding::new(&PICKLE_OPCODE, path, format!("{place}the pickle is faulty: {what}"))
            }
        };
        any = true;
        scan.find(finding.at(mention.offset));
    }
    Ok(any)
}
