//! States: what a function keeps from call to call.

use super::builder::{Arg, Builder, Value};
use super::types::TensorType;
use super::value::Operand;
use crate::container::coreml::mil::Binding;
use crate::error::Result;

/// A state. It is read once; whoever writes it writes into what was read last, so that nothing written is lost.
///
/// coremltools joins equal reads of a state wherever they stand, those on both sides of a write too: so there is one
/// at the first use and one behind each write, and each of them is used.
#[derive(Debug)]
pub struct State {
    name: String,
    ty: TensorType,
    latest: Option<Value>,
}

impl State {
    /// A state of float16.
    ///
    /// # Errors
    /// `Misuse` for a name that is taken or no identifier.
    pub fn new(b: &mut Builder<'_>, name: &str, shape: &[u64]) -> Result<Self> {
        let ty = b.state(name, shape)?;
        Ok(Self { name: name.into(), ty, latest: None })
    }

    /// What it holds now.
    pub fn read(&mut self, b: &mut Builder<'_>) -> Value {
        if let Some(latest) = &self.latest {
            return latest.clone();
        }
        let value = b.value(&format!("{}_read", self.name), Operand::of(self.ty.clone()));
        b.push("read_state", vec![("input", vec![Binding::Name(self.name.clone())])], &[&value]);
        self.latest = Some(value.clone());
        value
    }

    /// Puts `update` from `begin` to `end`.
    ///
    /// # Errors
    /// `Misuse` where it does not fit there.
    pub fn write(&mut self, b: &mut Builder<'_>, update: &Value, begin: &Value, end: &Value) -> Result<()> {
        let before = self.read(b);
        let inputs: [(&str, Arg<'_>); 4] = [
            ("x", (&before).into()),
            ("update", update.into()),
            ("begin", begin.into()),
            ("end", end.into()),
        ];
        let after = b.op("slice_update", &format!("{}_update", self.name), inputs)?;
        let name = |of: &str| vec![Binding::Name(of.into())];
        b.push("write_state", vec![("input", name(&self.name)), ("data", name(after.name()))], &[]);
        self.latest = None;
        self.read(b);
        Ok(())
    }
}
