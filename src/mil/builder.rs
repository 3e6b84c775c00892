//! Builds a function, operation by operation.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use half::f16;

use super::infer::infer;
use super::types::{Dim, Symbols, TensorType};
use super::value::{Int, Known, Operand};
use super::weight::{Encoded, Form, Stored, Weights};
use crate::container::coreml::mil::{
    Binding, Block, Function, NamedValueType, Operation, TensorValue, Value as Immediate, ValueType,
};
use crate::container::coreml::{DataType, Only};
use crate::error::{Error, Result};

/// The operations of iOS 18.
pub const OPSET: &str = "CoreML8";

/// A value of the function that is being built.
#[derive(Clone, Debug)]
pub struct Value {
    name: Arc<str>,
    operand: Operand,
}

impl Value {
    /// What it is called in the function.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its type.
    pub fn ty(&self) -> &TensorType {
        &self.operand.ty
    }

    /// Its shape, outermost dimension first.
    pub fn dims(&self) -> &[Dim] {
        &self.operand.ty.dims
    }

    pub(super) fn operand(&self) -> &Operand {
        &self.operand
    }
}

/// What a parameter is given: values that there are, or constants.
#[derive(Clone, Debug)]
pub enum Arg<'a> {
    /// A value.
    Value(&'a Value),
    /// Several, for `values` of `concat`.
    Values(Vec<&'a Value>),
    /// An integer.
    Int(i64),
    /// A vector of integers.
    Ints(Vec<i64>),
    /// A truth value.
    Bool(bool),
    /// A vector of truth values.
    Bools(Vec<bool>),
    /// A number, which is rounded to float16.
    Number(f32),
    /// A text.
    Text(&'static str),
}

macro_rules! from {
    ($($from:ty $(, $n:ident)? => |$x:ident| $arg:expr;)*) => {$(
        impl<'a $(, const $n: usize)?> From<$from> for Arg<'a> {
            fn from($x: $from) -> Self {
                $arg
            }
        }
    )*};
}

from! {
    &'a Value => |x| Self::Value(x);
    Vec<&'a Value> => |x| Self::Values(x);
    [&'a Value; N], N => |x| Self::Values(x.to_vec());
    i32 => |x| Self::Int(x.into());
    i64 => |x| Self::Int(x);
    Vec<i64> => |x| Self::Ints(x);
    [i64; N], N => |x| Self::Ints(x.to_vec());
    [i32; N], N => |x| Self::Ints(x.map(i64::from).to_vec());
    bool => |x| Self::Bool(x);
    Vec<bool> => |x| Self::Bools(x);
    [bool; N], N => |x| Self::Bools(x.to_vec());
    f32 => |x| Self::Number(x);
    &'static str => |x| Self::Text(x);
}

/// An input, an output or a state of a function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Feature {
    /// Its name.
    pub name: String,
    /// Its type; for states, that of what they hold.
    pub ty: TensorType,
}

/// A function, and what its description and its weight file need.
#[derive(Clone, Debug)]
pub struct Built {
    /// The function.
    pub function: Function,
    /// Inputs in order. Sizes that are not known are those that may vary.
    pub inputs: Vec<Feature>,
    /// Outputs in order.
    pub outputs: Vec<Feature>,
    /// States in order.
    pub states: Vec<Feature>,
    /// The weights that it uses, by the names that [`Weights::get`] was asked for.
    pub used: BTreeSet<String>,
}

/// Builds a function. Types of results are inferred, so that a program that does not fit together is not built;
/// names are made unique; equal constants are one.
pub struct Builder<'w> {
    weights: &'w dyn Weights,
    /// In front of names of weights and values.
    prefix: String,
    names: HashSet<String>,
    inputs: Vec<Feature>,
    states: Vec<Feature>,
    operations: Vec<Operation>,
    constants: HashMap<Vec<u8>, Value>,
    /// Weights that have been decoded, by name and shape.
    decoded: HashMap<(String, Vec<u64>), Value>,
    used: BTreeSet<String>,
    pub(super) symbols: Symbols,
}

impl<'w> Builder<'w> {
    /// A function of these weights, without anything in it.
    pub fn new(weights: &'w dyn Weights) -> Self {
        Self {
            weights,
            prefix: String::new(),
            names: HashSet::new(),
            inputs: Vec::new(),
            states: Vec::new(),
            operations: Vec::new(),
            constants: HashMap::new(),
            decoded: HashMap::new(),
            used: BTreeSet::new(),
            symbols: Symbols::default(),
        }
    }

    /// A size that varies from call to call.
    pub fn any(&mut self) -> Dim {
        self.symbols.fresh()
    }

    /// An input.
    ///
    /// # Errors
    /// `Misuse` for a name that is taken or no identifier.
    pub fn input(&mut self, name: &str, dtype: DataType, dims: &[Dim]) -> Result<Value> {
        self.take(name)?;
        let ty = TensorType::new(dtype, dims.to_vec());
        self.inputs.push(Feature { name: name.into(), ty: ty.clone() });
        Ok(Value { name: name.into(), operand: Operand::of(ty) })
    }

    /// A state of float16, by the type of what it holds. [`super::State`] is what reads and writes it.
    ///
    /// # Errors
    /// As [`Self::input`].
    pub(super) fn state(&mut self, name: &str, shape: &[u64]) -> Result<TensorType> {
        self.take(name)?;
        let ty = TensorType::fixed(DataType::Float16, shape);
        self.states.push(Feature { name: name.into(), ty: ty.clone() });
        Ok(ty)
    }

    /// What `build` adds, where names of weights and values begin so: `blk.0.`.
    ///
    /// # Errors
    /// Those of `build`.
    pub fn within<T>(&mut self, prefix: &str, build: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let outer = self.prefix.len();
        self.prefix.push_str(prefix);
        let built = build(self);
        self.prefix.truncate(outer);
        built
    }

    /// An operation with one result, which is called `name`.
    ///
    /// # Errors
    /// `Misuse` where operands do not go together; the message names the value.
    pub fn op<'a>(
        &mut self,
        kind: &'static str,
        name: &str,
        inputs: impl IntoIterator<Item = (&'static str, Arg<'a>)>,
    ) -> Result<Value> {
        let [value] = self.ops(kind, [name], inputs)?;
        Ok(value)
    }

    /// An operation with several results, which are called so.
    ///
    /// # Errors
    /// As [`Self::op`]; `Misuse` where there is another number of results.
    pub fn ops<'a, const N: usize>(
        &mut self,
        kind: &'static str,
        names: [&str; N],
        inputs: impl IntoIterator<Item = (&'static str, Arg<'a>)>,
    ) -> Result<[Value; N]> {
        let mut given = Vec::new();
        for (parameter, arg) in inputs {
            given.push((parameter, self.values(arg).map_err(|e| e.context(parameter))?));
        }
        let operands: Vec<(&str, Vec<&Operand>)> =
            given.iter().map(|(p, values)| (*p, values.iter().map(Value::operand).collect())).collect();
        let named = |e: Error| e.context(format!("{}{}", self.prefix, names.join(", ")));
        let results = infer(kind, &operands, &mut self.symbols).map_err(named)?;
        let count = results.len();
        let results: [Operand; N] = results
            .try_into()
            .map_err(|_| named(Error::misuse(format!("operation {kind}: {count} results, not {N}"))))?;
        let mut names = names.iter();
        let results = results.map(|operand| {
            let name = self.unique(names.next().copied().unwrap_or_default());
            Value { name: name.into(), operand }
        });
        let inputs = given.iter().map(|(parameter, values)| {
            let names = values.iter().map(|v| Binding::Name(v.name.to_string()));
            (*parameter, names.collect())
        });
        self.push(kind, inputs.collect(), &results.each_ref());
        Ok(results)
    }

    /// The weight of this name, behind the prefix, which has to be there.
    ///
    /// # Errors
    /// `Unsupported` where the model has none.
    pub fn encoded(&mut self, name: &str) -> Result<Encoded> {
        let missing = || {
            Error::unsupported(format!(
                "the graph needs the tensor {}{name}, which the model has not",
                self.prefix
            ))
            .hint("the definition's [graph] is not that of this model, or tensors are missing")
        };
        let found = self.weights.get(&format!("{}{name}", self.prefix)).ok_or_else(missing)?;
        self.used.insert(format!("{}{name}", self.prefix));
        Ok(found)
    }

    /// Whether there is a weight of this name, behind the prefix.
    pub fn has(&self, name: &str) -> bool {
        self.weights.get(&format!("{}{name}", self.prefix)).is_some()
    }

    /// The decoded values of a weight, by the operations of its encoding. They are there once in a function.
    ///
    /// # Errors
    /// `Misuse` where the parts of the encoding do not fit its shape.
    pub fn decode(&mut self, encoded: &Encoded) -> Result<Value> {
        let key = (encoded.name.clone(), encoded.shape.clone());
        if let Some(decoded) = self.decoded.get(&key) {
            return Ok(decoded.clone());
        }
        let wanted = TensorType::fixed(DataType::Float16, &encoded.shape);
        let context = |e: Error| e.context(format!("weight {}", encoded.name));
        let prefix = std::mem::take(&mut self.prefix);
        let decoded = encoded.form.clone().build(self, &encoded.name);
        self.prefix = prefix;
        let decoded = decoded.map_err(context)?;
        if *decoded.ty() != wanted {
            return Err(context(Error::misuse(format!("it is {}, not {wanted}", decoded.ty()))));
        }
        self.decoded.insert(key, decoded.clone());
        Ok(decoded)
    }

    /// A constant vector.
    ///
    /// # Errors
    /// `Misuse` for integers beyond 32 bits.
    pub fn ints(&mut self, ints: &[i64]) -> Result<Value> {
        let mut values = self.values(Arg::Ints(ints.to_vec()))?;
        values.pop().ok_or_else(|| Error::misuse("no constant"))
    }

    /// Factors of a weight, in this shape.
    ///
    /// # Errors
    /// As [`Self::decode`].
    pub fn factors(&mut self, of: &Encoded, factors: &Stored, shape: &[u64]) -> Result<Value> {
        let name = format!("{}_scale", of.name);
        let encoded =
            Encoded { name, shape: factors.shape.clone(), form: Form::Plain(factors.clone()), after: None };
        self.decode(&encoded.reshaped(shape)?)
    }

    /// The function that gives these values under these names.
    ///
    /// # Errors
    /// `Misuse` for a name that is taken or no identifier, and for a value that is an input, or is given twice.
    pub fn finish(mut self, outputs: &[(&str, &Value)]) -> Result<Built> {
        let mut renamed = HashMap::new();
        for (name, value) in outputs {
            if value.name() != *name {
                self.take(name)?;
            }
            let is_input = self.inputs.iter().any(|f| f.name == value.name());
            if is_input || renamed.insert(value.name(), *name).is_some() {
                return Err(Error::misuse(format!("the output {name} is given already as {}", value.name)));
            }
        }
        let rename = |name: &mut String| {
            if let Some(new) = renamed.get(name.as_str()) {
                *name = (*new).into();
            }
        };
        for operation in &mut self.operations {
            for binding in operation.inputs.values_mut().flat_map(|argument| &mut argument.0) {
                if let Binding::Name(name) = binding {
                    rename(name);
                }
            }
            operation.outputs.iter_mut().for_each(|output| rename(&mut output.name));
            if let Some(first) = operation.outputs.first() {
                operation.attributes.insert("name".into(), Immediate::string(&*first.name));
            }
        }
        let feature =
            |(name, value): &(&str, &Value)| Feature { name: (*name).into(), ty: value.ty().clone() };
        let outputs: Vec<Feature> = outputs.iter().map(feature).collect();
        let named = |f: &Feature| NamedValueType::new(&*f.name, declared(&f.ty));
        let state =
            |f: &Feature| NamedValueType::new(&*f.name, ValueType::State(Only(Box::new(declared(&f.ty)))));
        let block = Block {
            outputs: outputs.iter().map(|f| f.name.clone()).collect(),
            operations: self.operations,
            ..Block::default()
        };
        let function = Function {
            inputs: self.inputs.iter().map(named).chain(self.states.iter().map(state)).collect(),
            opset: OPSET.into(),
            block_specializations: BTreeMap::from([(OPSET.into(), block)]),
            ..Function::default()
        };
        Ok(Built { function, inputs: self.inputs, outputs, states: self.states, used: self.used })
    }

    /// An operation as it is; its results are known.
    pub(super) fn push(&mut self, kind: &str, inputs: Vec<(&str, Vec<Binding>)>, outputs: &[&Value]) {
        let name = match outputs {
            [first, ..] => first.name.to_string(),
            [] => self.unique(kind),
        };
        self.operations.push(Operation {
            kind: kind.into(),
            inputs: inputs.into_iter().map(|(parameter, to)| (parameter.into(), Only(to))).collect(),
            outputs: outputs.iter().map(|v| NamedValueType::new(v.name(), declared(v.ty()))).collect(),
            attributes: BTreeMap::from([("name".into(), Immediate::string(name))]),
            ..Operation::default()
        });
    }

    /// A value that no operation is known to give.
    pub(super) fn value(&mut self, name: &str, operand: Operand) -> Value {
        Value { name: self.unique(name).into(), operand }
    }

    /// A constant as an operation of its own.
    pub(super) fn constant(&mut self, name: &str, value: Immediate, operand: Operand) -> Value {
        let result = self.value(name, operand);
        self.push("const", Vec::new(), &[&result]);
        if let Some(operation) = self.operations.last_mut() {
            operation.attributes.insert("val".into(), value);
        }
        result
    }

    fn values(&mut self, arg: Arg<'_>) -> Result<Vec<Value>> {
        let int = |n: &i64| {
            i32::try_from(*n).map_err(|_| Error::misuse(format!("{n} is beyond what 32 bits hold")))
        };
        let ints = |list: &[i64]| list.iter().map(int).collect::<Result<Vec<i32>>>();
        let known_ints = |list: &[i64]| Some(Known::Ints(list.iter().map(|n| Int::Known(*n)).collect()));
        let (dtype, shape, elements, known) = match arg {
            Arg::Value(value) => return Ok(vec![value.clone()]),
            Arg::Values(values) => return Ok(values.into_iter().cloned().collect()),
            Arg::Int(n) => {
                (DataType::Int32, vec![], TensorValue::Ints(Only(vec![int(&n)?])), known_ints(&[n]))
            }
            Arg::Ints(n) => {
                (DataType::Int32, vec![n.len() as u64], TensorValue::Ints(Only(ints(&n)?)), known_ints(&n))
            }
            Arg::Bool(b) => {
                (DataType::Bool, vec![], TensorValue::Bools(Only(vec![b])), Some(Known::Bools(vec![b])))
            }
            Arg::Bools(b) => {
                let elements = TensorValue::Bools(Only(b.clone()));
                (DataType::Bool, vec![b.len() as u64], elements, Some(Known::Bools(b)))
            }
            Arg::Number(x) => {
                let rounded = f16::from_f32(x);
                if !rounded.is_finite() {
                    return Err(Error::unsupported(format!("{x} is beyond what float16 holds")));
                }
                (DataType::Float16, vec![], TensorValue::Bytes(Only(rounded.to_le_bytes().into())), None)
            }
            Arg::Text(text) => {
                let elements = TensorValue::Strings(Only(vec![text.into()]));
                (DataType::String, vec![], elements, Some(Known::Text(text.into())))
            }
        };
        let value = Immediate::immediate(dtype, &shape, elements);
        let key = crate::container::coreml::encode(&value);
        if let Some(there) = self.constants.get(&key) {
            return Ok(vec![there.clone()]);
        }
        let operand = Operand { known, ..Operand::weight(TensorType::fixed(dtype, &shape)) };
        let prefix = std::mem::take(&mut self.prefix);
        let constant = self.constant(&format!("c_{}", self.constants.len()), value, operand);
        self.prefix = prefix;
        self.constants.insert(key, constant.clone());
        Ok(vec![constant])
    }

    /// Takes a name that has to be it.
    fn take(&mut self, name: &str) -> Result<()> {
        if name != identifier(name) || !self.names.insert(name.into()) {
            return Err(Error::misuse(format!("the name {name:?} is taken, or is no identifier")));
        }
        Ok(())
    }

    /// The identifier that a name behind the prefix becomes; if it is taken, with a number.
    fn unique(&mut self, name: &str) -> String {
        let name = identifier(&format!("{}{name}", self.prefix));
        let numbered = (1u64..).map(|n| format!("{name}_{n}"));
        let free = std::iter::once(name.clone()).chain(numbered).find(|name| !self.names.contains(name));
        let free = free.unwrap_or(name);
        self.names.insert(free.clone());
        free
    }
}

/// The identifier that stands for a name: `[A-Za-z_][A-Za-z0-9_@]*`, with `_` for all else.
pub fn identifier(name: &str) -> String {
    let fits = |c: char| c.is_ascii_alphanumeric() || c == '_' || c == '@';
    let text: String = name.chars().map(|c| if fits(c) { c } else { '_' }).collect();
    match text.chars().next() {
        Some(c) if c.is_ascii_alphabetic() || c == '_' => text,
        _ => format!("_{text}"),
    }
}

fn declared(ty: &TensorType) -> ValueType {
    ValueType::tensor(ty.dtype, &ty.declared())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::text::Text;
    use super::*;
    use crate::error::ErrorKind;

    /// A model without tensors.
    struct Nothing;

    impl Weights for Nothing {
        fn get(&self, _: &str) -> Option<Encoded> {
            None
        }
    }

    #[test]
    fn constants_are_one_and_outputs_have_their_names() {
        let mut b = Builder::new(&Nothing);
        let n = b.any();
        let x = b.input("x", DataType::Float16, &[Dim::Known(2), n]).unwrap();
        let y = b.within("blk.0.", |b| b.mul("twice", &x, 2.0)).unwrap();
        let z = b.within("blk.0.", |b| b.mul("twice", &y, 2.0)).unwrap();
        let z = b.softmax("softmax", &z, -1).unwrap();
        let z = b.transpose("turned", &z, [1, 0]).unwrap();
        assert_eq!((y.name(), z.dims()), ("blk_0_twice", &[n, Dim::Known(2)][..]));
        let built = b.finish(&[("probabilities", &z), ("half", &y)]).unwrap();
        assert_eq!(
            Text(&built.function).to_string(),
            "input x:fp16[2,?]\n\
             mul x=x, y=2 -> half:fp16[2,?]\n\
             mul x=half, y=2 -> blk_0_twice_1:fp16[2,?]\n\
             softmax x=blk_0_twice_1, axis=-1 -> softmax:fp16[2,?]\n\
             transpose x=softmax, perm=[1,0] -> probabilities:fp16[?,2]\n\
             output probabilities\n\
             output half\n"
        );
        let block = &built.function.block_specializations[OPSET];
        let constants: Vec<&str> =
            block.operations.iter().filter(|o| o.kind == "const").map(|o| &*o.outputs[0].name).collect();
        assert_eq!(constants, ["c_0", "c_1", "c_2"]);
        for operation in &block.operations {
            assert_eq!(operation.attributes["name"], Immediate::string(&*operation.outputs[0].name));
        }
    }

    #[test]
    fn faults_say_where() {
        let mut b = Builder::new(&Nothing);
        let x = b.input("x", DataType::Float16, &[Dim::Known(4)]).unwrap();
        assert!(b.input("x", DataType::Int32, &[]).is_err() && b.input("1.x", DataType::Int32, &[]).is_err());
        let y = b.range("y", 5, 0).unwrap();
        let e = b.within("blk.7.", |b| b.add("sum", &x, &y)).unwrap_err();
        assert!(e.to_string().contains("blk.7.sum") && e.kind() == ErrorKind::Misuse, "{e}");
        let e = b.within("blk.7.", |b| b.encoded("attn_norm.weight")).unwrap_err();
        assert!(
            e.to_string().contains("blk.7.attn_norm.weight") && e.kind() == ErrorKind::Unsupported,
            "{e}"
        );
        for (e, words) in [
            (b.mul("x", &x, 1e6).unwrap_err(), "1000000 is beyond"),
            (b.range("r", 1i64 << 40, 0).unwrap_err(), "beyond what 32 bits hold"),
            (b.ops("silu", ["a", "b"], [("x", (&x).into())]).unwrap_err(), "1 results, not 2"),
        ] {
            assert!(e.to_string().contains(words), "{words:?} was expected: {e}");
        }
        let z = b.silu("z", &x).unwrap();
        let finish = |outputs: &[(&str, &Value)]| {
            let mut b = Builder::new(&Nothing);
            b.input("x", DataType::Float16, &[Dim::Known(4)]).unwrap();
            b.silu("z", &x).unwrap();
            b.finish(outputs).map(|built| built.outputs)
        };
        assert!(finish(&[("out", &z)]).is_ok() && finish(&[("z", &z)]).is_ok());
        for outputs in [&[("x", &x)][..], &[("y", &x)], &[("y", &z), ("w", &z)], &[("x", &z)], &[("a b", &z)]]
        {
            assert_eq!(finish(outputs).unwrap_err().kind(), ErrorKind::Misuse, "{outputs:?}");
        }
    }

    proptest! {
        #[test]
        fn names_are_identifiers_and_unique(names in proptest::collection::vec("[a-c.\\- \u{e9}0-2@]{0,3}", 1..20)) {
            let mut b = Builder::new(&Nothing);
            let mut seen = HashSet::new();
            for name in &names {
                let value = b.range(name, 3, 0).unwrap();
                let mut chars = value.name().chars();
                let first = chars.next().unwrap();
                prop_assert!(first.is_ascii_alphabetic() || first == '_', "{}", value.name());
                prop_assert!(chars.all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '@'));
                prop_assert!(seen.insert(value.name().to_string()), "{}", value.name());
            }
        }
    }
}
