//! That nothing written into a state is lost: by data flow, from each read to the writes that build on it.
//!
//! What a state holds is numbered: each write makes the next. A write has to build on the latest; what is read has to
//! be no older than what was written last into its rows, which are those of the first dimension. Values that have the
//! state's own type carry its content: through the `x` of `slice_update`, and through any other operation.

use std::collections::HashMap;
use std::ops::Range;

use super::program::{Typed, bound};
use crate::container::coreml::mil::{Argument, Binding, Operation};
use crate::error::{Error, Result};
use crate::mil::Known;

/// Most rows that are followed of one value: a layer's, or all layers' of a small model.
const MOST_ROWS: usize = 1024;

/// What a value has of a state.
#[derive(Clone)]
struct Content<'a> {
    state: &'a str,
    /// How many writes there were before it was read.
    version: usize,
    /// Whether it has something of another state too.
    is_mixed: bool,
    /// Rows that were put into it since, where all of them are known.
    put: Option<Vec<u64>>,
}

#[derive(Default)]
struct Held {
    reads: usize,
    writes: usize,
    /// For each row that is known to have been written: by which write the last time, and how often.
    rows: HashMap<u64, (usize, usize)>,
    /// Whether something was written of which the rows are not known.
    is_vague: bool,
}

#[derive(Default)]
struct Flow<'a> {
    states: HashMap<&'a str, Held>,
    content: HashMap<&'a str, Content<'a>>,
}

/// Looks at the states of a function. Returns how many reads and writes there are.
///
/// # Errors
/// `Malformed` for what is lost, with the operation.
pub(super) fn check(typed: &Typed<'_>) -> Result<(usize, usize)> {
    let (mut flow, mut reads, mut writes) = (Flow::default(), 0, 0);
    for operation in &typed.block.operations {
        let named = |e: Error| {
            let name = operation.outputs.first().map(|o| o.name.as_str());
            let name = name.or_else(|| bound(operation, "data")).unwrap_or_default();
            e.context(format_args!("{} {name:?}", operation.kind))
        };
        match operation.kind.as_str() {
            "read_state" => flow.read(operation),
            "write_state" => flow.write(operation).map_err(named)?,
            _ => flow.carry(typed, operation).map_err(named)?,
        }
    }
    for input in typed.function.inputs.iter().filter(|input| typed.states.contains_key(input.name.as_str())) {
        let name = input.name.as_str();
        let held = flow.states.remove(name).unwrap_or_default();
        if held.reads == 0 || held.writes == 0 {
            let what = if held.reads == 0 { "read" } else { "written" };
            return Err(Error::malformed(format!("the state {name:?} is never {what}")));
        }
        whole(typed, name, &held)?;
        (reads, writes) = (reads + held.reads, writes + held.writes);
    }
    Ok((reads, writes))
}

impl<'a> Flow<'a> {
    fn read(&mut self, operation: &'a Operation) {
        let (Some(state), Some(output)) = (bound(operation, "input"), operation.outputs.first()) else {
            return;
        };
        let held = self.states.entry(state).or_default();
        held.reads += 1;
        let content = Content { state, version: held.writes, is_mixed: false, put: Some(Vec::new()) };
        self.content.insert(&output.name, content);
    }

    fn write(&mut self, operation: &'a Operation) -> Result<()> {
        let (Some(state), Some(data)) = (bound(operation, "input"), bound(operation, "data")) else {
            return Ok(());
        };
        let held = self.states.entry(state).or_default();
        let mut put = None;
        match self.content.get(data) {
            Some(content) if content.is_mixed || content.state != state => {
                return Err(Error::malformed(format!("puts what another state holds into {state:?}")));
            }
            Some(content) if content.version < held.writes => {
                return Err(Error::malformed(format!(
                    "puts back into the state {state:?} what was read of it before it was last written: that write is \
                     lost"
                )));
            }
            Some(content) => put = content.put.clone(),
            None if held.writes > 0 || held.reads > 0 => {
                return Err(Error::malformed(format!(
                    "does not build on what the state {state:?} holds: that is lost"
                )));
            }
            None => {}
        }
        held.writes += 1;
        match put {
            Some(rows) => {
                for row in rows {
                    let (last, count) = held.rows.entry(row).or_default();
                    (*last, *count) = (held.writes, *count + 1);
                }
            }
            None => held.is_vague = true,
        }
        Ok(())
    }

    /// Any other operation: what it gives has a state's content where it has its type.
    fn carry(&mut self, typed: &Typed<'a>, operation: &'a Operation) -> Result<()> {
        let names = |argument: &'a Argument| {
            argument.0.iter().filter_map(|binding| match binding {
                Binding::Name(name) => Some(name.as_str()),
                _ => None,
            })
        };
        let Some(result) = operation.outputs.first().map(|o| o.name.as_str()) else { return Ok(()) };
        let result_type = typed.values.get(result).map(|value| &value.ty);
        let is_update = operation.kind == "slice_update";
        let mut found: Option<Content<'a>> = None;
        for (parameter, argument) in &operation.inputs {
            for name in names(argument) {
                let Some(content) = self.content.get(name) else { continue };
                let is_whole = typed.values.get(name).map(|value| &value.ty) == result_type;
                if !is_whole || is_update && parameter != "x" {
                    self.look(typed, operation, content)?;
                    continue;
                }
                found = Some(match found {
                    None => content.clone(),
                    Some(other) => Content {
                        version: other.version.max(content.version),
                        is_mixed: other.is_mixed || content.is_mixed || other.state != content.state,
                        put: None,
                        ..other
                    },
                });
            }
        }
        let Some(mut content) = found else { return Ok(()) };
        content.put = match (content.put, rows_of(typed, operation).filter(|_| is_update)) {
            (Some(mut all), Some(rows)) if rows.end - rows.start <= (MOST_ROWS - all.len()) as u64 => {
                all.extend(rows);
                Some(all)
            }
            _ => None,
        };
        self.content.insert(result, content);
        Ok(())
    }

    /// What is read out of a state's content: not from before its rows were last written.
    fn look(&self, typed: &Typed<'a>, operation: &Operation, content: &Content<'a>) -> Result<()> {
        let Some(rows) = rows_of(typed, operation).filter(|_| operation.kind == "slice_by_index") else {
            return Ok(());
        };
        let Some(held) = self.states.get(content.state) else { return Ok(()) };
        let newer = |row: &u64| held.rows.get(row).is_some_and(|(last, _)| *last > content.version);
        match rows.take(MOST_ROWS).find(newer) {
            None => Ok(()),
            Some(row) => Err(Error::malformed(format!(
                "takes row {row} of the state {:?} as it was before it was written",
                content.state
            ))),
        }
    }
}

/// Where all rows that are written are known: each is, once.
fn whole(typed: &Typed<'_>, state: &str, held: &Held) -> Result<()> {
    if held.is_vague {
        return Ok(());
    }
    let count = typed.states.get(state).and_then(|ty| ty.dims.first()?.known()).unwrap_or(1);
    let fault = |row: u64, what: &str| {
        Err(Error::malformed(format!("row {row} of the state {state:?}, which has {count}, is {what}")))
    };
    let twice = held.rows.iter().filter(|(_, (_, count))| *count > 1).map(|(row, _)| *row).min();
    if let Some(row) = twice {
        return fault(row, "written twice: what was written first is lost");
    }
    match (0..count).find(|row| !held.rows.contains_key(row)) {
        Some(row) => fault(row, "never written"),
        None => Ok(()),
    }
}

/// The range of the first dimension from `begin` to `end`, where both are known; with `squeeze_mask` one of them.
fn rows_of(typed: &Typed<'_>, operation: &Operation) -> Option<Range<u64>> {
    let operand = |parameter: &str| typed.values.get(bound(operation, parameter)?);
    let first = |parameter: &str| match operand(parameter)?.ints()? {
        [first, ..] => first.known().and_then(|n| u64::try_from(n).ok()),
        [] => None,
    };
    let mask = |parameter: &str| match operand(parameter).map(|operand| &operand.known) {
        Some(Some(Known::Bools(bools))) => bools.first().copied().unwrap_or(false),
        _ => false,
    };
    if mask("begin_mask") {
        return None;
    }
    let begin = first("begin")?;
    if mask("squeeze_mask") {
        return Some(begin..begin.checked_add(1)?);
    }
    let end = if mask("end_mask") { return None } else { first("end")? };
    (begin < end).then_some(begin..end)
}
