//! The tokenizer beside a package: that it can be read, has no more tokens than the package has logits for, and is the
//! source's.

use std::path::Path;

use tokenizers::Tokenizer;

use super::super::{Options, Outcome};
use crate::container::coreml::package::is_package;
use crate::container::side::read_side_file;
use crate::convert::TokenCheck;
use crate::convert::to_coreml::Opened;
use crate::error::{Error, ErrorKind, Result};
use crate::eval::SAMPLE_TEXT;
use crate::eval::tokens::Tokens;
use crate::exec::LanguageModel;

/// Files that are tokenizers, the one that counts first.
const FILES: [&str; 2] = ["tokenizer.json", "tokenizer.model"];

/// Looks at it.
///
/// # Errors
/// `Malformed` for a tokenizer that is none, or has too many tokens; `Io`.
pub(super) fn check(options: &Options, source: Option<&Opened>) -> Result<(Outcome, String)> {
    let skipped = |why: &str| Ok((Outcome::Skipped, why.to_string()));
    if options.tokens == TokenCheck::Skipped {
        return skipped("not asked for");
    }
    let (path, limits) = (options.file.as_path(), &options.limits);
    let dir = if is_package(path) { beside(path) } else { path };
    if !FILES.iter().any(|name| dir.join(name).is_file()) {
        return skipped("there is no tokenizer beside the package");
    }
    let n_vocab = match LanguageModel::open(path, limits) {
        Ok(model) => model.n_vocab(),
        Err(e) if e.kind() == ErrorKind::Unsupported => return skipped(&e.to_string()),
        Err(e) => return Err(e),
    };
    let tokens = Tokens::open(dir, n_vocab, limits)?;
    let some = tokens.tokenize(SAMPLE_TEXT, false, false)?.len();
    let sound = format!("beside the package, for at most {n_vocab} tokens; {some} in the text of the check");
    let Some(source) = source else { return Ok((Outcome::Passed, sound)) };
    let of_source =
        |name: &str| source.side.iter().find(|(n, _)| n == name).map(|(_, bytes)| bytes.as_slice());
    let mut differs = None;
    for name in FILES {
        let found = read_side_file(&dir.join(name), limits.side_file_bytes)?;
        let (Some(found), Some(wanted)) = (found, of_source(name)) else { continue };
        if found != wanted {
            differs = difference(name, &found, wanted)?;
        }
        break;
    }
    Ok(match (differs, options.tokens) {
        (None, _) => (Outcome::Passed, format!("{sound}; as in the source")),
        (Some(what), TokenCheck::Required) => (Outcome::Failed, what),
        (Some(what), _) => (Outcome::Passed, format!("allowed to differ: {what}")),
    })
}

/// Where a single package lies.
pub(super) fn beside(path: &Path) -> &Path {
    path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// What two tokenizers of different bytes have that is not the same.
fn difference(name: &str, found: &[u8], wanted: &[u8]) -> Result<Option<String>> {
    if name != FILES[0] {
        return Ok(Some(format!("{name} is not the source's")));
    }
    let open = |bytes: &[u8]| {
        let opened = Tokenizer::from_bytes(bytes);
        opened.map_err(|e| Error::malformed(format!("{name} cannot be read: {e}")))
    };
    let (found, wanted) = (open(found)?, open(wanted)?);
    if found.get_vocab(true) != wanted.get_vocab(true) {
        return Ok(Some(format!("{name} has other tokens than the source's")));
    }
    let ids = |tokenizer: &Tokenizer| {
        let encoded = tokenizer.encode_fast(SAMPLE_TEXT, false);
        let encoded = encoded.map_err(|e| Error::malformed(format!("{name} cannot tokenize: {e}")))?;
        Ok::<_, Error>(encoded.get_ids().to_vec())
    };
    let is_same = ids(&found)? == ids(&wanted)?;
    Ok((!is_same).then(|| format!("{name} divides a text into other tokens than the source's")))
}
