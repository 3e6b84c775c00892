//! That all of a weight file is of use: each blob is a value's, and the bits behind its elements are zeros.

use std::collections::{BTreeSet, HashMap};

use crate::container::coreml::Package;
use crate::container::coreml::mil::{Binding, Block, Program, Stored};
use crate::error::{Error, Result};

/// Blobs and bytes of the weight files.
pub(super) struct Sums {
    pub(super) blobs: usize,
    pub(super) bytes: u64,
    /// Values that name them.
    pub(super) values: usize,
}

/// Looks at the weight files of an opened package, whose records are in order.
///
/// # Errors
/// `Malformed` for a blob that no value names, or with bits behind its elements; `Io`.
pub(super) fn check(package: &Package) -> Result<Sums> {
    let used = used(&package.model().program);
    let mut sums = Sums { blobs: 0, bytes: 0, values: used.values().map(|(_, n)| n).sum() };
    let none = (BTreeSet::new(), 0);
    for (name, file) in package.weights() {
        let (places, _) = used.get(name.as_str()).unwrap_or(&none);
        for blob in file.blobs() {
            let refused = |what: String| {
                Err(Error::malformed(format!("the blob at byte {} {what}", blob.record))
                    .at(file.file().path()))
            };
            if !places.contains(&blob.record) {
                return refused(format!("of {} bytes of {} is no value's", blob.bytes, blob.data_type));
            }
            if blob.padding_bits() > 0 && blob.bytes > 0 {
                let mut last = [0];
                file.read(blob, blob.bytes - 1, &mut last)?;
                if u64::from(last[0]) >> (8 - blob.padding_bits().min(8)) != 0 {
                    return refused(format!(
                        "has {} bits behind its elements that are not zero",
                        blob.padding_bits()
                    ));
                }
            }
            sums.blobs += 1;
            sums.bytes = sums.bytes.saturating_add(blob.bytes);
        }
    }
    Ok(sums)
}

/// Places that values name, by file, and how many values there are.
fn used(program: &Program) -> HashMap<&str, (BTreeSet<u64>, usize)> {
    let mut used: HashMap<&str, (BTreeSet<u64>, usize)> = HashMap::new();
    let mut blocks: Vec<&Block> =
        program.functions.values().flat_map(|f| f.block_specializations.values()).collect();
    while let Some(block) = blocks.pop() {
        for operation in &block.operations {
            let inline = operation.inputs.values().flat_map(|argument| &argument.0);
            let inline = inline.filter_map(|binding| match binding {
                Binding::Value(value) => Some(value),
                _ => None,
            });
            for value in inline.chain(operation.attributes.values()) {
                if let Stored::Blob(at) = &value.stored {
                    let (places, values) = used.entry(&at.file_name).or_default();
                    places.insert(at.offset);
                    *values += 1;
                }
            }
            blocks.extend(&operation.blocks);
        }
    }
    used
}
