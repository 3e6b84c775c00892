//! What the evaluation of one expression may take: definitions come from files, and a few variables that name each
//! other twice would be evaluated without end.
//!
//! Steps and sizes of values are counted from the outermost expression on, on the thread that evaluates it. What
//! the definitions of `formats/` take is a thousandth of it.

use std::cell::Cell;

use serde_json::Value as Json;

use crate::error::{Error, Result};

/// Most steps; an element of a list that is made or copied is one, too.
const MAX_STEPS: u64 = 1 << 21;
/// Deepest nesting of expressions, through variables too.
const MAX_DEPTH: u32 = 128;
/// Bytes of text that count as a step.
const TEXT_STEP: u64 = 16;

thread_local! {
    /// Depth, and steps taken by the outermost expression.
    static TAKEN: Cell<(u32, u64)> = const { Cell::new((0, 0)) };
}

/// An expression that is being evaluated.
pub struct Step(());

impl Step {
    /// # Errors
    /// `Limit`.
    pub fn begin() -> Result<Self> {
        let (depth, steps) = TAKEN.get();
        if depth >= MAX_DEPTH {
            return Err(Error::limit(format!("expressions refer to each other more than {MAX_DEPTH} deep")));
        }
        TAKEN.set((depth + 1, if depth == 0 { 0 } else { steps }));
        let step = Self(());
        spend(1)?;
        Ok(step)
    }

    /// What it gave.
    ///
    /// # Errors
    /// `Limit`.
    pub fn end(self, value: &Json) -> Result<()> {
        spend(size(value))
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        let (depth, steps) = TAKEN.get();
        TAKEN.set((depth.saturating_sub(1), steps));
    }
}

fn spend(n: u64) -> Result<()> {
    let (depth, steps) = TAKEN.get();
    let steps = steps.saturating_add(n);
    TAKEN.set((depth, steps));
    match steps > MAX_STEPS {
        true => Err(Error::limit(format!("an expression takes more than {MAX_STEPS} steps"))),
        false => Ok(()),
    }
}

/// What a copy of it takes.
fn size(value: &Json) -> u64 {
    match value {
        Json::String(text) => text.len() as u64 / TEXT_STEP,
        Json::Array(list) => list.iter().map(|v| 1 + size(v)).sum(),
        Json::Object(map) => map.iter().map(|(k, v)| 1 + k.len() as u64 / TEXT_STEP + size(v)).sum(),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::super::expr::{Expr, Scope};
    use super::*;
    use crate::error::ErrorKind;
    use serde_json::json;

    /// `v0` is said by `v1` and so on, as often as `with` says.
    struct Chain(usize, &'static str);

    impl Scope for Chain {
        fn get(&self, name: &str) -> Result<Option<Json>> {
            let n: usize = name.strip_prefix('v').and_then(|n| n.parse().ok()).unwrap_or(0);
            if n == self.0 {
                return Ok(Some(json!("aaaa")));
            }
            Expr::parse(&self.1.replace('v', &format!("v{}", n + 1)))?.eval(self).map(Some)
        }
    }

    fn kind(text: &str, scope: &dyn Scope) -> ErrorKind {
        Expr::parse(text).unwrap().eval(scope).unwrap_err().kind()
    }

    #[test]
    fn growth_and_depth_end() {
        assert_eq!(kind("v0", &Chain(40, "v + v")), ErrorKind::Limit);
        assert_eq!(kind("v0", &Chain(40, "[v, v]")), ErrorKind::Limit);
        assert_eq!(kind("v0", &Chain(1000, "v")), ErrorKind::Limit);
        assert_eq!(kind("v0", &Chain(1000, "(v ?? v)")), ErrorKind::Limit);
        let lists = "len(per_layer(per_layer(i, 65536), 65536))";
        assert_eq!(kind(lists, &Chain(0, "v")), ErrorKind::Limit);
        // What was spent is spent on that expression alone.
        for _ in 0..10 {
            let n = Expr::parse("len(per_layer(i, 65536))").unwrap().eval(&Chain(0, "v"));
            assert_eq!(n.unwrap(), json!(65536));
        }
        let chain = format!("1{}", " + 1".repeat(1000));
        assert_eq!(Expr::parse(&chain).unwrap_err().kind(), ErrorKind::Malformed);
        assert_eq!(Expr::parse(&"1 ".repeat(100_000)).unwrap_err().kind(), ErrorKind::Limit);
    }
}
