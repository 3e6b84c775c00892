//! A `.qpack` file that was made of a GGUF file, read as that: the metadata are a file in it, and its tensors lie in
//! it as they were.

use std::path::Path;

use crate::container::InputFile;
use crate::container::qpack::{CONFIG, Encoding, METADATA, Qpack, Tensor, is_qpack};
use crate::error::{Error, Result};
use crate::limits::Limits;

use super::layout::{MAX_DIMS, MAX_NAME};
use super::read::Gguf;

/// Whether `file` is a `.qpack` file that was made of a GGUF file.
///
/// # Errors
/// As [`Qpack::open`].
pub(super) fn is_packed(file: &InputFile) -> Result<bool> {
    Ok(is_qpack(file)? && has_metadata(&Qpack::open(file.path(), &Limits::default())?))
}

fn has_metadata(model: &Qpack) -> bool {
    model.files().iter().any(|f| f.name == METADATA)
}

/// Opens the `.qpack` file at `path`.
///
/// # Errors
/// `Unsupported` for one of another source, and for tensors that GGUF does not have; what the readers of both
/// formats say.
pub(super) fn open(path: &Path, limits: &Limits) -> Result<Gguf> {
    let model = Qpack::open(path, limits)?;
    if !has_metadata(&model) {
        let hint = match model.files().iter().any(|f| f.name == CONFIG) {
            true => "it holds a Hugging Face model: hf-to-gguf converts it",
            false => "its tensors can be looked at (inspect) and checked (verify), and unpacked (unpack)",
        };
        let why = format!("is a .qpack file that was not made of GGUF: it holds no {METADATA}");
        return Err(Error::unsupported(why).at(path).hint(hint));
    }
    for tensor in model.tensors() {
        check(tensor).map_err(|e| e.context(format_args!("tensor {:?}", tensor.name)).at(path))?;
    }
    let inside = path.join(METADATA);
    let header = InputFile::of_bytes(&inside, model.read_file(METADATA, limits)?);
    let mut gguf = Gguf::of_file(&inside, header, limits)?;
    if !gguf.store.tensors().is_empty() || gguf.shards != 1 {
        let why = "holds tensors, or is one file of many: metadata alone were expected";
        return Err(Error::malformed(why).at(inside));
    }
    let (store, _) = model.into_parts()?;
    gguf.shards = store.files().len();
    // Whatever the source was, tensors are little-endian here, and begin at places of their own.
    (gguf.big_endian, gguf.data_offset, gguf.trailing_bytes) = (false, 0, 0);
    gguf.store = store;
    Ok(gguf)
}

/// That a tensor is one that GGUF has.
fn check(tensor: &Tensor) -> Result<()> {
    tensor.check_readable()?;
    let Encoding::Plain(dtype) = tensor.encoding else {
        return Err(Error::unsupported(format!(
            "is encoded as {}, beside {METADATA}; tensors of GGUF are plain",
            tensor.encoding.kind()
        )));
    };
    if dtype.ggml_id().is_none() {
        return Err(Error::unsupported(format!("is {dtype}, which GGUF does not have")));
    }
    if tensor.shape.len() > MAX_DIMS as usize || tensor.name.len() > MAX_NAME {
        return Err(Error::unsupported(format!(
            "has {} dimensions and a name of {} bytes; GGUF has at most {MAX_DIMS} and {MAX_NAME}",
            tensor.shape.len(),
            tensor.name.len()
        )));
    }
    Ok(())
}
