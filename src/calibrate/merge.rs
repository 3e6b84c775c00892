//! Several files of second moments as one: sums add up.

use std::path::Path;

use super::resume::Workplace;
use crate::container::moments::{Contents, Input, Moments};
use crate::error::{Error, Result};

/// Values added at once.
const SPAN: usize = 16 << 10;

/// Adds up `files`, of one model, and writes `target`. Inputs may be in some of the files only. `watch` is
/// asked again and again, and may stop with an error.
///
/// # Errors
/// `Misuse` for files of different models, with the same text for the same input, or inputs that differ in
/// shape; as reading and writing fail.
pub fn merge(
    files: &[Moments],
    paths: &[impl AsRef<Path>],
    target: &Path,
    force: bool,
    watch: &mut dyn FnMut() -> Result<()>,
) -> Result<Contents> {
    let contents = joined(files, paths)?;
    let (layout, places) = contents.layout()?;
    let work = Workplace::anew(target, &layout.header, layout.total_len, force)?;
    let mut add_all = || -> Result<()> {
        for (input, places) in contents.inputs.iter().zip(&places) {
            let of: Vec<(&Moments, &Input)> =
                files.iter().filter_map(|f| Some((f, f.input_of(&input.name)?))).collect();
            for expert in 0..input.experts {
                let count = |&(f, i): &(&Moments, &Input)| -> Result<u64> {
                    Ok(f.counts(i)?.get(expert as usize).copied().unwrap_or(0))
                };
                let counts = of.iter().map(count).collect::<Result<Vec<_>>>()?;
                let total = counts.iter().try_fold(0u64, |sum, n| sum.checked_add(*n));
                let total = total.and_then(|n| i64::try_from(n).ok());
                let total =
                    total.ok_or_else(|| Error::malformed(format!("{:?}: too many tokens", input.name)))?;
                work.write_at(places.counts + expert * 8, &total.to_le_bytes())?;
                let packed = input.packed().unwrap_or(0);
                for start in (0..packed).step_by(SPAN) {
                    watch()?;
                    let n = SPAN.min((packed - start) as usize);
                    let read = |&(f, i): &(&Moments, &Input)| {
                        let mut values = vec![0f32; n];
                        f.read_packed(i, expert, start, &mut values).map(|()| values)
                    };
                    let at = places.moments + (expert * packed + start) * 4;
                    write_sum(&work, at, of.iter().map(read))?;
                }
                let at = expert * input.columns * 4;
                write_sum(&work, places.sum + at, of.iter().map(|(f, i)| f.sum(i, expert)))?;
                write_sum(&work, places.sum_abs + at, of.iter().map(|(f, i)| f.sum_abs(i, expert)))?;
            }
        }
        Ok(())
    };
    match add_all() {
        Ok(()) => work.commit()?,
        Err(e) => {
            work.discard();
            return Err(e);
        }
    }
    Ok(contents)
}

/// Adds in f64, in the order of the files.
fn write_sum(work: &Workplace, at: u64, parts: impl Iterator<Item = Result<Vec<f32>>>) -> Result<()> {
    let mut sum: Vec<f64> = Vec::new();
    for part in parts {
        let part = part?;
        sum.resize(part.len(), 0.0);
        sum.iter_mut().zip(part).for_each(|(s, v)| *s += f64::from(v));
    }
    if sum.iter().any(|v| !(*v as f32).is_finite()) {
        return Err(Error::malformed("the sums are NaN, infinite or too large"));
    }
    let bytes: Vec<u8> = sum.iter().flat_map(|v| (*v as f32).to_le_bytes()).collect();
    work.write_at(at, &bytes)
}

/// What the merged file states.
fn joined(files: &[Moments], paths: &[impl AsRef<Path>]) -> Result<Contents> {
    let Some(first) = files.first() else { return Err(Error::misuse("nothing to merge")) };
    let (model, texts, inputs) = (first.contents().model.clone(), Vec::new(), Vec::<Input>::new());
    let mut all = Contents { model, texts, inputs };
    for (n, (file, path)) in files.iter().zip(paths).enumerate() {
        let own = file.contents();
        if own.model != all.model {
            return Err(Error::misuse("was made with another model than the first").at(path));
        }
        for input in &own.inputs {
            match all.inputs.iter().find(|i| i.name == input.name) {
                None => all.inputs.push(input.clone()),
                Some(known) if known != input => {
                    return Err(Error::misuse(format!(
                        "has other inputs of {:?} than the first",
                        input.name
                    ))
                    .at(path));
                }
                Some(_) => {
                    let earlier = files.iter().take(n).filter(|f| f.input_of(&input.name).is_some());
                    let mut texts = earlier.flat_map(|f| &f.contents().texts);
                    if let Some(twice) = texts.find(|t| own.texts.iter().any(|o| o.tokens == t.tokens)) {
                        let message = format!("counts the text {:?} again for {:?}", twice.name, input.name);
                        return Err(Error::misuse(message)
                            .at(path)
                            .hint("merge files of different texts, or of different layers"));
                    }
                }
            }
        }
        for text in &own.texts {
            if !all.texts.iter().any(|t| t.tokens == text.tokens) {
                all.texts.push(text.clone());
            }
        }
    }
    Ok(all)
}
