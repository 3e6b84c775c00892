//! Functions as text, one line for each operation.

use std::collections::{HashMap, HashSet};
use std::fmt;

use half::f16;

use super::infer::OPERATIONS;
use crate::container::coreml::mil::{
    Argument, Binding, Dimension, Function, ImmediateValue, Operation, Stored, TensorType, TensorValue,
    Value, ValueType,
};

/// Constants of at most so many elements stand where they are used.
const SHORT: usize = 16;

/// A function as text:
///
/// ```text
/// input inputIds:int32[1,?]
/// state keyCache:fp16[1,1,2,64,16]
/// const @64 -> blk_0_attn_q_weight:fp16[64,64]
/// linear x=h, weight=blk_0_attn_q_weight -> blk_0_attn_q:fp16[1,?,64]
/// output logits
/// ```
///
/// Integers, truth values, texts and single numbers stand where they are used; `@64` is a place in the weight file.
/// Parameters are in the order of [`OPERATIONS`]. Any function can be shown, not only those that qconv builds.
#[derive(Clone, Copy)]
pub struct Text<'a>(pub &'a Function);

impl fmt::Display for Text<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for input in &self.0.inputs {
            match &input.value_type {
                ValueType::State(held) => writeln!(f, "state {}:{}", input.name, Type(&held.0))?,
                other => writeln!(f, "input {}:{}", input.name, Type(other))?,
            }
        }
        let Some(block) = self.0.block_specializations.get(&self.0.opset) else {
            return writeln!(f, "no block for {}", self.0.opset);
        };
        let outputs: HashSet<&str> = block.outputs.iter().map(String::as_str).collect();
        let mut inline = HashMap::new();
        for operation in &block.operations {
            if let Some((name, text)) = short(operation).filter(|(name, _)| !outputs.contains(name)) {
                inline.insert(name, text);
                continue;
            }
            line(f, operation, &inline)?;
        }
        block.outputs.iter().try_for_each(|name| writeln!(f, "output {name}"))
    }
}

/// The name of a constant that stands where it is used, and how it is shown there.
fn short(operation: &Operation) -> Option<(&str, String)> {
    let (value, [output]) = (operation.attributes.get("val")?, &operation.outputs[..]) else { return None };
    let is_const = operation.kind == "const" && operation.inputs.is_empty();
    Some((output.name.as_str(), elements(value)?)).filter(|_| is_const)
}

/// Few elements of a value, where they say more than its type.
fn elements(value: &Value) -> Option<String> {
    let (ValueType::Tensor(ty), Stored::Immediate(ImmediateValue::Tensor(held))) =
        (&value.value_type, &value.stored)
    else {
        return None;
    };
    fn list<T>(all: &[T], show: impl Fn(&T) -> String) -> Option<Vec<String>> {
        (all.len() <= SHORT).then(|| all.iter().map(show).collect())
    }
    let is_scalar = ty.dimensions.is_empty();
    let shown = match held {
        TensorValue::Ints(all) => list(&all.0, i32::to_string)?,
        TensorValue::LongInts(all) => list(&all.0, i64::to_string)?,
        TensorValue::Bools(all) => list(&all.0, bool::to_string)?,
        TensorValue::Strings(all) => list(&all.0, |text| format!("{text:?}"))?,
        TensorValue::Floats(all) if is_scalar => list(&all.0, f32::to_string)?,
        TensorValue::Doubles(all) if is_scalar => list(&all.0, f64::to_string)?,
        TensorValue::Bytes(all) if is_scalar && ty.data_type.name() == "fp16" => {
            list(all.0.as_chunks::<2>().0, |bytes| f16::from_le_bytes(*bytes).to_string())?
        }
        _ => return None,
    };
    match (is_scalar, &shown[..]) {
        (true, [one]) => Some(one.clone()),
        (true, _) => None,
        (false, all) => Some(format!("[{}]", all.join(","))),
    }
}

fn line(f: &mut fmt::Formatter<'_>, operation: &Operation, inline: &HashMap<&str, String>) -> fmt::Result {
    write!(f, "{}", operation.kind)?;
    let known = OPERATIONS.iter().copied().flatten().find(|o| o.name == operation.kind);
    let place = |name: &str| known.and_then(|o| o.parameters.iter().position(|p| p.name == name));
    let mut inputs: Vec<(&String, &Argument)> = operation.inputs.iter().collect();
    inputs.sort_by_key(|(name, _)| place(name).unwrap_or(usize::MAX));
    for (i, (name, argument)) in inputs.into_iter().enumerate() {
        let shown: Vec<String> = argument.0.iter().map(|binding| bound(binding, inline)).collect();
        let separator = if i == 0 { " " } else { ", " };
        match &shown[..] {
            [one] if name != "values" => write!(f, "{separator}{name}={one}")?,
            several => write!(f, "{separator}{name}=({})", several.join(", "))?,
        }
    }
    for (name, value) in operation.attributes.iter().filter(|(name, _)| *name != "name") {
        match (operation.kind == "const", value_text(value)) {
            (true, text) => write!(f, " {text}")?,
            (false, text) => write!(f, " {name}={text}")?,
        }
    }
    let results: Vec<String> =
        operation.outputs.iter().map(|o| format!("{}:{}", o.name, Type(&o.value_type))).collect();
    match results.is_empty() {
        true => writeln!(f),
        false => writeln!(f, " -> {}", results.join(", ")),
    }
}

fn bound(binding: &Binding, inline: &HashMap<&str, String>) -> String {
    match binding {
        Binding::Name(name) => inline.get(name.as_str()).unwrap_or(name).clone(),
        Binding::Value(value) => match elements(value) {
            Some(text) => text,
            None => format!("{}{}", Type(&value.value_type), value_text(value)),
        },
        Binding::None => "nothing".into(),
    }
}

/// Where a value is.
fn value_text(value: &Value) -> String {
    match &value.stored {
        Stored::Blob(at) => format!("@{}", at.offset),
        Stored::Immediate(_) => elements(value).unwrap_or_else(|| "here".into()),
        Stored::None => "nowhere".into(),
    }
}

struct Type<'a>(&'a ValueType);

impl fmt::Display for Type<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let TensorType { data_type, dimensions, .. } = match self.0 {
            ValueType::Tensor(tensor) => tensor,
            ValueType::List(_) => return f.write_str("list"),
            ValueType::Tuple(_) => return f.write_str("tuple"),
            ValueType::Dictionary(_) => return f.write_str("dictionary"),
            ValueType::State(held) => return write!(f, "state {}", Type(&held.0)),
            ValueType::None => return f.write_str("no type"),
        };
        let size = |dimension: &Dimension| match dimension {
            Dimension::Constant(n) => n.0.to_string(),
            Dimension::Unknown(_) => "?".into(),
            Dimension::None => "none".into(),
        };
        let sizes: Vec<String> = dimensions.iter().map(size).collect();
        write!(f, "{data_type}[{}]", sizes.join(","))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::container::coreml::mil::{Block, ListType, NamedValueType};
    use crate::container::coreml::{DataType, Only};

    /// What qconv does not write is shown too, and nothing of any length in a line.
    #[test]
    fn anything_is_shown() {
        let fp16 = |n| ValueType::fixed(DataType::Float16, &[n]);
        let bytes = |n: u64| Value::immediate(DataType::Float16, &[n], TensorValue::Bytes(Only(vec![0; 6])));
        let int8 = Value::blob(DataType::Int8, &[3, 2], 128);
        let operation =
            |kind: &str, inputs: Vec<(&str, Vec<Binding>)>, val: Option<Value>, out: &str, ty| Operation {
                kind: kind.into(),
                inputs: inputs.into_iter().map(|(name, b)| (name.into(), Only(b))).collect(),
                outputs: vec![NamedValueType::new(out, ty)],
                attributes: val.into_iter().map(|v| ("val".to_string(), v)).collect(),
                ..Operation::default()
            };
        let many = Value::immediate(DataType::Int32, &[17], TensorValue::Ints(Only(vec![1; 17])));
        let name = |name: &str| vec![Binding::Name(name.into())];
        let operations = vec![
            operation("const", vec![], Some(many), "many", ValueType::fixed(DataType::Int32, &[17])),
            operation("const", vec![], Some(Value::string("a\nb")), "text", ValueType::None),
            operation("const", vec![], Some(bytes(3)), "numbers", fp16(3)),
            operation(
                "unknown_op",
                vec![("b", name("text")), ("a", vec![Binding::None])],
                None,
                "y",
                fp16(2),
            ),
            operation("constexpr_x", vec![("data", vec![Binding::Value(int8)])], None, "z", ValueType::None),
            operation("concat", vec![("values", name("y"))], Some(Value::default()), "w", fp16(2)),
        ];
        let block = Block { operations, outputs: vec!["text".into()], ..Block::default() };
        let list = ListType { element: Box::new(fp16(1)), ..ListType::default() };
        let mut function = Function {
            inputs: vec![
                NamedValueType::new("list", ValueType::List(list)),
                NamedValueType::new("s", ValueType::state(DataType::Float16, &[2, 3])),
            ],
            opset: "CoreML8".into(),
            block_specializations: BTreeMap::from([("CoreML8".into(), block)]),
            ..Function::default()
        };
        assert_eq!(
            Text(&function).to_string(),
            "input list:list\n\
             state s:fp16[2,3]\n\
             const here -> many:int32[17]\n\
             const \"a\\nb\" -> text:no type\n\
             const here -> numbers:fp16[3]\n\
             unknown_op a=nothing, b=text -> y:fp16[2]\n\
             constexpr_x data=int8[3,2]@128 -> z:no type\n\
             concat values=(y) val=nowhere -> w:fp16[2]\n\
             output text\n"
        );
        function.opset.clear();
        assert!(Text(&function).to_string().ends_with("no block for \n"));
    }
}
