//! Whether the values of a program are where their types say.

use std::collections::BTreeMap;

use super::dtype::{DataType, Held};
use super::mil::{
    Binding, BlobFileValue, Block, ImmediateValue, KeyValuePair, Operation, Program, Stored, TensorType,
    TensorValue, Value, ValueType,
};
use crate::error::{Error, Result};

/// Checks every value of a program: those in it have as many elements as their type says, in the list that is for
/// it; `blob` judges those in weight files. Each function has a block for its opset.
///
/// # Errors
/// `Malformed`, with the function, the operation and the parameter; those of `blob`.
pub fn values(
    program: &Program,
    blob: &mut dyn FnMut(&BlobFileValue, &TensorType) -> Result<()>,
) -> Result<()> {
    let mut check = Check { blob };
    check.attributes(&program.attributes)?;
    for (name, function) in &program.functions {
        let all = check.attributes(&function.attributes).and_then(|()| {
            if !function.block_specializations.contains_key(&function.opset) {
                return Err(Error::malformed(format!("has no block for its opset {:?}", function.opset)));
            }
            function.block_specializations.values().try_for_each(|block| check.block(block))
        });
        all.map_err(|e| e.context(format_args!("function {name:?}")))?;
    }
    Ok(())
}

struct Check<'a> {
    blob: &'a mut dyn FnMut(&BlobFileValue, &TensorType) -> Result<()>,
}

impl Check<'_> {
    fn block(&mut self, block: &Block) -> Result<()> {
        self.attributes(&block.attributes)?;
        for (n, operation) in block.operations.iter().enumerate() {
            let named = |e: Error| match operation.outputs.first() {
                Some(first) => e.context(format_args!("{} {:?}", operation.kind, first.name)),
                None => e.context(format_args!("operation {n}, {}", operation.kind)),
            };
            self.operation(operation).map_err(named)?;
        }
        Ok(())
    }

    fn operation(&mut self, operation: &Operation) -> Result<()> {
        for (name, argument) in &operation.inputs {
            for binding in &argument.0 {
                if let Binding::Value(value) = binding {
                    self.value(value).map_err(|e| e.context(name))?;
                }
            }
        }
        self.attributes(&operation.attributes)?;
        operation.blocks.iter().try_for_each(|block| self.block(block))
    }

    fn attributes(&mut self, attributes: &BTreeMap<String, Value>) -> Result<()> {
        attributes.iter().try_for_each(|(name, value)| self.value(value).map_err(|e| e.context(name)))
    }

    fn value(&mut self, value: &Value) -> Result<()> {
        match (&value.stored, &value.value_type) {
            (Stored::None, _) => Err(Error::malformed("has no value")),
            (Stored::Blob(at), ValueType::Tensor(tensor)) => (self.blob)(at, tensor),
            (Stored::Blob(_), _) => Err(Error::malformed("lies in a weight file, and is no tensor")),
            (Stored::Immediate(ImmediateValue::Tensor(held)), ValueType::Tensor(tensor)) => {
                immediate(tensor, held)
            }
            (Stored::Immediate(ImmediateValue::Tuple(list)), ValueType::Tuple(types)) => {
                if types.0.len() != list.0.len() {
                    let (wanted, found) = (types.0.len(), list.0.len());
                    return Err(Error::malformed(format!("is a tuple of {found}, its type has {wanted}")));
                }
                list.0.iter().try_for_each(|v| self.value(v))
            }
            (Stored::Immediate(ImmediateValue::List(list)), ValueType::List(_)) => {
                list.0.iter().try_for_each(|v| self.value(v))
            }
            (Stored::Immediate(ImmediateValue::Dictionary(pairs)), ValueType::Dictionary(_)) => {
                pairs.0.iter().try_for_each(|KeyValuePair { key, value }| {
                    self.value(key)?;
                    self.value(value)
                })
            }
            (Stored::Immediate(_), _) => Err(Error::malformed("is of another kind than its type")),
        }
    }
}

/// That a tensor in the program has the elements of its type.
fn immediate(tensor: &TensorType, held: &TensorValue) -> Result<()> {
    let elements = tensor.elements()?;
    let (list, found) = match held {
        TensorValue::None => (tensor.data_type.held(), 0),
        TensorValue::Floats(v) => (Held::Floats, v.0.len()),
        TensorValue::Ints(v) => (Held::Ints, v.0.len()),
        TensorValue::Bools(v) => (Held::Bools, v.0.len()),
        TensorValue::Strings(v) => (Held::Strings, v.0.len()),
        TensorValue::LongInts(v) => (Held::LongInts, v.0.len()),
        TensorValue::Doubles(v) => (Held::Doubles, v.0.len()),
        TensorValue::Bytes(v) => (Held::Bytes, v.0.len()),
    };
    let (data_type, wanted) = (tensor.data_type, tensor.data_type.held());
    if data_type == DataType::Unused {
        return Err(Error::malformed("has elements of no type"));
    }
    if elements == 0 && found == 0 {
        return Ok(());
    }
    if list != wanted {
        return Err(Error::malformed(format!(
            "has elements of type {data_type} among {list:?}, they belong to {wanted:?}"
        )));
    }
    let count = if list == Held::Bytes { data_type.bytes(elements) } else { Some(elements) };
    if count != Some(found as u64) {
        let what = if list == Held::Bytes { "bytes" } else { "elements" };
        return Err(Error::malformed(format!(
            "has {found} {what}, which are not {elements} elements of type {data_type}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::message::Only;
    use super::super::mil::{Function, ListType, NamedValueType};
    use super::*;

    fn program(value: Value) -> Program {
        let inputs =
            [("data".to_string(), Only(vec![Binding::Name("x".into()), Binding::Value(value)]))].into();
        let outputs = vec![NamedValueType::new("w", ValueType::None)];
        let inner = Operation { kind: "const".into(), inputs, outputs, ..Operation::default() };
        let block = |operation| Block { operations: vec![operation], ..Block::default() };
        let outer = Operation { kind: "loop".into(), blocks: vec![block(inner)], ..Operation::default() };
        let blocks = [("CoreML8".to_string(), block(outer))].into();
        let main = Function { opset: "CoreML8".into(), block_specializations: blocks, ..Function::default() };
        Program { functions: [("main".to_string(), main)].into(), ..Program::default() }
    }

    fn check(value: Value) -> Result<()> {
        values(&program(value), &mut |_, _| Err(Error::malformed("a blob")))
    }

    fn refused(value: Value, words: &str) {
        let e = check(value).unwrap_err();
        let wanted = format!("function \"main\": operation 0, loop: const \"w\": data: {words}");
        assert_eq!(e.to_string(), wanted);
    }

    fn of(value_type: ValueType, stored: ImmediateValue) -> Value {
        Value { value_type, stored: Stored::Immediate(stored), ..Value::default() }
    }

    #[test]
    fn elements_are_counted() {
        let ints = |n: usize| TensorValue::Ints(Only(vec![7; n]));
        let bytes = |n: usize| TensorValue::Bytes(Only(vec![7; n]));
        check(Value::immediate(DataType::Int32, &[2, 3], ints(6))).unwrap();
        check(Value::immediate(DataType::UInt3, &[9], bytes(4))).unwrap();
        check(Value::immediate(DataType::Float16, &[3, 0], TensorValue::None)).unwrap();
        check(Value::string("x")).unwrap();
        refused(
            Value::immediate(DataType::Int32, &[2, 3], ints(5)),
            "has 5 elements, which are not 6 elements of type int32",
        );
        refused(
            Value::immediate(DataType::UInt3, &[9], bytes(3)),
            "has 3 bytes, which are not 9 elements of type uint3",
        );
        refused(
            Value::immediate(DataType::Float16, &[6], ints(6)),
            "has elements of type fp16 among Ints, they belong to Bytes",
        );
        refused(
            Value::immediate(DataType::Float16, &[1], TensorValue::None),
            "has 0 bytes, which are not 1 elements of type fp16",
        );
        refused(Value::immediate(DataType::Unused, &[], bytes(0)), "has elements of no type");
        refused(Value::default(), "has no value");
        refused(Value::blob(DataType::Float16, &[1], 64), "a blob");
        let state = Value { value_type: ValueType::None, ..Value::blob(DataType::Float16, &[1], 64) };
        refused(state, "lies in a weight file, and is no tensor");
    }

    #[test]
    fn a_function_has_the_block_that_counts() {
        let mut program = program(Value::string("x"));
        program.functions.values_mut().for_each(|f| f.opset = "CoreML9".into());
        let e = values(&program, &mut |_, _| Ok(())).unwrap_err();
        assert_eq!(e.to_string(), "function \"main\": has no block for its opset \"CoreML9\"");
    }

    #[test]
    fn what_is_inside_is_checked_too() {
        let faulty = || Value::immediate(DataType::Bool, &[], TensorValue::Bools(Only(vec![])));
        let wrong = "has 0 elements, which are not 1 elements of type bool";
        let list = || ValueType::List(ListType::default());
        refused(of(list(), ImmediateValue::List(Only(vec![Value::string("x"), faulty()]))), wrong);
        let pair = KeyValuePair { key: Value::string("k"), value: faulty() };
        let dictionary = ValueType::Dictionary(Default::default());
        refused(of(dictionary, ImmediateValue::Dictionary(Only(vec![pair]))), wrong);
        let tuple = |n| ValueType::Tuple(Only(vec![ValueType::None; n]));
        refused(of(tuple(1), ImmediateValue::Tuple(Only(vec![faulty()]))), wrong);
        refused(of(tuple(2), ImmediateValue::Tuple(Only(vec![faulty()]))), "is a tuple of 1, its type has 2");
        refused(of(list(), ImmediateValue::Tuple(Only(vec![]))), "is of another kind than its type");
    }
}
